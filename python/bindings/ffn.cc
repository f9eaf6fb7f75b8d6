#include "csfast/ffn.h"

#include "call.h"
#include "layer.h"

using namespace nb::literals;

namespace {

void ffn(nb::handle codes, nb::handle equal, nb::handle row_scale, nb::handle threshold,
         nb::handle gate, nb::handle up, nb::handle down_t, nb::handle x, int code, int tile_rows,
         nb::handle offset, nb::handle gate_bias, nb::handle up_bias, nb::handle down_bias,
         nb::handle votes, const char* activation, const char* design, nb::handle stats,
         nb::handle cap, nb::handle dropped, nb::handle workspace, nb::handle out,
         uintptr_t stream) {
  Call call("ffn");
  LayerSizes sizes;
  csfast::FfnParams p{};
  p.x = call.in_type(x, "x", {&sizes.batch, &sizes.d});
  p.layer.sensor = unpack(call, sizes, SensorArgs{codes, equal, row_scale, offset, code});
  p.layer.decision = unpack(call, sizes, sizes.lists(votes), {threshold, votes, cap, tile_rows});
  p.layer.weights =
      unpack(call, sizes, WeightsArgs{gate, up, down_t, gate_bias, up_bias, down_bias});
  p.layer.form = form_of(call, sizes, activation);
  if (!dropped.is_none()) p.dropped = call.out<int64_t>(dropped, "dropped", {&sizes.one});
  if (!stats.is_none()) p.stats = call.out<int64_t>(stats, "stats", {&sizes.two});
  p.out = call.out_type(out, "out", {&sizes.batch, &sizes.d});
  p.workspace = call.workspace(workspace,
                               csfast::ffn_workspace(sizes.batch, sizes.d, sizes.n, call.device()));
  p.batch = sizes.batch;
  p.design = csfast::parse_design("ffn", design);
  unlocked([&] { csfast::ffn(p, call.device(), stream_of(stream)); });
}

int64_t ffn_workspace(int64_t batch, int64_t d, int64_t n_neurons, bool cuda) {
  return csfast::ffn_workspace(batch, d, n_neurons,
                               cuda ? csfast::Device::kCuda : csfast::Device::kCpu);
}

}  // namespace

void bind_ffn(nb::module_& m) {
  m.def("ffn", &ffn, "codes"_a, "equal"_a, "row_scale"_a, "threshold"_a, "gate"_a, "up"_a,
        "down_t"_a, "x"_a, "code"_a, "tile_rows"_a, "offset"_a.none(), "gate_bias"_a.none(),
        "up_bias"_a.none(), "down_bias"_a.none(), "votes"_a.none(), "activation"_a, "design"_a,
        "stats"_a.none(), "cap"_a.none(), "dropped"_a.none(), "workspace"_a, "out"_a, "stream"_a,
        nb::sig("def ffn(codes: torch.Tensor, equal: torch.Tensor, row_scale: torch.Tensor, "
                "threshold: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, "
                "down_t: torch.Tensor, x: torch.Tensor, code: int, tile_rows: int, "
                "offset: torch.Tensor | None, gate_bias: torch.Tensor | None, "
                "up_bias: torch.Tensor | None, down_bias: torch.Tensor | None, "
                "votes: torch.Tensor | None, activation: str, design: str, "
                "stats: torch.Tensor | None, cap: torch.Tensor | None, "
                "dropped: torch.Tensor | None, workspace: torch.Tensor, out: torch.Tensor, "
                "stream: int) -> None"));
  m.def("ffn_workspace", &ffn_workspace, "batch"_a, "d"_a, "n_neurons"_a, "cuda"_a);
}
