#include "csfast/session.h"

#include <nanobind/stl/string.h>

#include "call.h"
#include "layer.h"

using namespace nb::literals;

namespace {

int64_t bind(csfast::Session& session, nb::handle layer, int code, nb::handle stats,
             nb::handle workspace, bool cuda) {
  Call call("session");
  LayerSizes sizes{.batch = {"max_batch"}};
  csfast::FfnParams p{};
  p.layer.weights = unpack(call, sizes, weights_of(layer));
  p.layer.sensor = unpack(call, sizes, sensor_of(layer, code));
  p.layer.decision = unpack(call, sizes, sizes.batch, decision_of(layer));
  const auto activation = nb::cast<std::string>(field(layer, "activation"));
  p.layer.form = form_of(call, sizes, activation.c_str());
  if (!stats.is_none()) p.stats = call.out<int64_t>(stats, "stats", {&sizes.two});
  p.workspace = call.workspace(workspace,
                               csfast::ffn_workspace(sizes.batch, sizes.d, sizes.n, call.device()));
  if ((call.device() == csfast::Device::kCuda) != cuda) {
    throw nb::value_error("[session] tensors of another device: want those of the session.");
  }
  p.batch = sizes.batch;
  return session.bind(p);
}

void ffn(csfast::Session& session, int64_t layer, uintptr_t x, uintptr_t out, int64_t batch,
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
      .def("bind", &bind, "layer"_a, "code"_a, "stats"_a.none(), "workspace"_a, "cuda"_a,
           nb::sig("def bind(self, layer: object, code: int, stats: torch.Tensor | None, "
                   "workspace: torch.Tensor, cuda: bool) -> int"))
      .def("ffn", &ffn, "layer"_a, "x"_a, "out"_a, "batch"_a, "stream"_a);
}
