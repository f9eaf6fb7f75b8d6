#include "csfast/ffn.h"

#include "call.h"
#include "codes.h"

using namespace nb::literals;

namespace {

void ffn(nb::handle codes, nb::handle equal, nb::handle row_scale, nb::handle threshold,
         nb::handle gate, nb::handle up, nb::handle down_t, nb::handle x, int code, int tile_rows,
         nb::handle offset, nb::handle gate_bias, nb::handle up_bias, nb::handle down_bias,
         nb::handle weight, const char* activation, const char* design, nb::handle stats,
         nb::handle cap, nb::handle dropped, nb::handle workspace, nb::handle out,
         uintptr_t stream) {
  Call call("ffn");
  Size batch{"batch"}, d{"d"}, n{"n_neurons"}, two{"2", 2}, one{"1", 1};
  csfast::FfnParams p{};
  p.x = call.in_type(x, "x", {&batch, &d});
  p.code = code_of(code);
  CodeSizes sizes(p.code, d);
  p.codes = call.in<uint8_t>(codes, "codes", {&n, &two, &sizes.groups, &sizes.bytes});
  p.equal = call.in<float>(equal, "equal", {&d});
  p.row_scale = call.in<float>(row_scale, "row_scale", {&n, &two});
  p.offset = call.in_or_null<float>(offset, "offset", {&n, &two});
  p.weight = call.in_or_null<float>(weight, "weight", {&batch});
  p.threshold = call.in<float>(threshold, "threshold", {p.weight == nullptr ? &batch : &one});
  p.gate = call.in_type(gate, "gate", {&n, &d});
  p.up = call.in_type(up, "up", {&n, &d});
  p.down_t = call.in_type(down_t, "down_t", {&n, &d});
  p.gate_bias = call.in_type_or_null(gate_bias, "gate_bias", {&n});
  p.up_bias = call.in_type_or_null(up_bias, "up_bias", {&n});
  p.down_bias = call.in_type_or_null(down_bias, "down_bias", {&d});
  p.cap = call.in_or_null<int32_t>(cap, "cap", {p.weight == nullptr ? &batch : &one});
  if (!dropped.is_none()) p.dropped = call.out<int64_t>(dropped, "dropped", {&one});
  if (!stats.is_none()) p.stats = call.out<int64_t>(stats, "stats", {&two});
  p.out = call.out_type(out, "out", {&batch, &d});
  p.workspace = call.workspace(workspace, csfast::ffn_workspace(batch, d, n, call.device()));
  p.batch = batch;
  p.d = d;
  p.n_neurons = n;
  p.tile_rows = tile_rows;
  p.dtype = call.dtype();
  p.activation = call.activation(activation);
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
        "up_bias"_a.none(), "down_bias"_a.none(), "weight"_a.none(), "activation"_a, "design"_a,
        "stats"_a.none(), "cap"_a.none(), "dropped"_a.none(), "workspace"_a, "out"_a, "stream"_a,
        nb::sig("def ffn(codes: torch.Tensor, equal: torch.Tensor, row_scale: torch.Tensor, "
                "threshold: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, "
                "down_t: torch.Tensor, x: torch.Tensor, code: int, tile_rows: int, "
                "offset: torch.Tensor | None, gate_bias: torch.Tensor | None, "
                "up_bias: torch.Tensor | None, down_bias: torch.Tensor | None, "
                "weight: torch.Tensor | None, activation: str, design: str, "
                "stats: torch.Tensor | None, cap: torch.Tensor | None, "
                "dropped: torch.Tensor | None, workspace: torch.Tensor, out: torch.Tensor, "
                "stream: int) -> None"));
  m.def("ffn_workspace", &ffn_workspace, "batch"_a, "d"_a, "n_neurons"_a, "cuda"_a);
}
