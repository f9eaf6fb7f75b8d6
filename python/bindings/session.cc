#include "csfast/session.h"

#include "call.h"
#include "codes.h"

using namespace nb::literals;

namespace {

int64_t bind(csfast::Session& session, nb::handle codes, nb::handle equal, nb::handle row_scale,
             nb::handle threshold, nb::handle gate, nb::handle up, nb::handle down_t, int code,
             int tile_rows, nb::handle stats, nb::handle workspace, bool cuda) {
  Call call("session");
  Size batch{"max_batch"}, d{"d"}, n{"n_neurons"}, two{"2", 2};
  csfast::FfnParams p{};
  p.gate = call.in_type(gate, "gate", {&n, &d});
  p.up = call.in_type(up, "up", {&n, &d});
  p.down_t = call.in_type(down_t, "down_t", {&n, &d});
  p.code = code_of(code);
  CodeSizes sizes(p.code, d);
  p.codes = call.in<uint8_t>(codes, "codes", {&n, &two, &sizes.groups, &sizes.bytes});
  p.equal = call.in<float>(equal, "equal", {&d});
  p.row_scale = call.in<float>(row_scale, "row_scale", {&n, &two});
  p.threshold = call.in<float>(threshold, "threshold", {&batch});
  if (!stats.is_none()) p.stats = call.out<int64_t>(stats, "stats", {&two});
  p.workspace = call.workspace(workspace, csfast::ffn_workspace(batch, d, n, call.device()));
  if ((call.device() == csfast::Device::kCuda) != cuda) {
    throw nb::value_error("[session] tensors of another device: want those of the session.");
  }
  p.batch = batch;
  p.d = d;
  p.n_neurons = n;
  p.tile_rows = tile_rows;
  p.dtype = call.dtype();
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
           "down_t"_a, "code"_a, "tile_rows"_a, "stats"_a.none(), "workspace"_a, "cuda"_a,
           nb::sig("def bind(self, codes: torch.Tensor, equal: torch.Tensor, "
                   "row_scale: torch.Tensor, threshold: torch.Tensor, gate: torch.Tensor, "
                   "up: torch.Tensor, down_t: torch.Tensor, code: int, tile_rows: int, "
                   "stats: torch.Tensor | None, workspace: torch.Tensor, cuda: bool) -> int"))
      .def("ffn", &ffn, "layer"_a, "x"_a, "out"_a, "batch"_a, "stream"_a);
}
