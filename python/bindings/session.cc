#include "csfast/session.h"

#include "call.h"
#include "layer.h"

using namespace nb::literals;

namespace {

int64_t bind(csfast::Session& session, nb::handle codes, nb::handle equal, nb::handle row_scale,
             nb::handle threshold, nb::handle gate, nb::handle up, nb::handle down_t, int code,
             int tile_rows, nb::handle offset, nb::handle gate_bias, nb::handle up_bias,
             nb::handle down_bias, nb::handle weight, const char* activation, nb::handle stats,
             nb::handle workspace, bool cuda) {
  Call call("session");
  LayerSizes sizes{.batch = {"max_batch"}};
  csfast::FfnParams p{};
  p.layer.weights =
      unpack(call, sizes, WeightsArgs{gate, up, down_t, gate_bias, up_bias, down_bias});
  p.layer.sensor = unpack(call, sizes, SensorArgs{codes, equal, row_scale, offset, code});
  p.layer.decision = unpack(call, sizes, sizes.batch, {threshold, weight, nb::none(), tile_rows});
  p.layer.form = form_of(call, sizes, activation);
  if (!stats.is_none()) p.stats = call.out<int64_t>(stats, "stats", {&sizes.two});
  p.workspace = call.workspace(workspace,
                               csfast::ffn_workspace(sizes.batch, sizes.d, sizes.n, call.device()));
  if ((call.device() == csfast::Device::kCuda) != cuda) {
    throw nb::value_error("[session] tensors of another device: want those of the session.");
  }
  p.batch = sizes.batch;
  return session.bind(p);
}

void ffn(const csfast::Session& session, int64_t layer, uintptr_t x, uintptr_t out, int64_t batch,
         uintptr_t stream) {
  unlocked([&] {
    session.ffn(layer, reinterpret_cast<const void*>(x), reinterpret_cast<void*>(out), batch,
                stream_of(stream));
  });
}

}  // namespace

void bind_session(nb::module_& m) {
  nb::class_<csfast::Session>(m, "Session")
      .def(
          "__init__",
          [](csfast::Session* session, bool cuda) {
            new (session) csfast::Session(cuda ? csfast::Device::kCuda : csfast::Device::kCpu);
          },
          "cuda"_a)
      .def("bind", &bind, "codes"_a, "equal"_a, "row_scale"_a, "threshold"_a, "gate"_a, "up"_a,
           "down_t"_a, "code"_a, "tile_rows"_a, "offset"_a.none(), "gate_bias"_a.none(),
           "up_bias"_a.none(), "down_bias"_a.none(), "weight"_a.none(), "activation"_a,
           "stats"_a.none(), "workspace"_a, "cuda"_a,
           nb::sig("def bind(self, codes: torch.Tensor, equal: torch.Tensor, "
                   "row_scale: torch.Tensor, threshold: torch.Tensor, gate: torch.Tensor, "
                   "up: torch.Tensor, down_t: torch.Tensor, code: int, tile_rows: int, "
                   "offset: torch.Tensor | None, gate_bias: torch.Tensor | None, "
                   "up_bias: torch.Tensor | None, down_bias: torch.Tensor | None, "
                   "weight: torch.Tensor | None, activation: str, "
                   "stats: torch.Tensor | None, workspace: torch.Tensor, cuda: bool) -> int"))
      .def("ffn", &ffn, "layer"_a, "x"_a, "out"_a, "batch"_a, "stream"_a);
}
