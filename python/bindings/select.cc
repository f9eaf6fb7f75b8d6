#include "csfast/select.h"

#include "call.h"
#include "codes.h"
#include "csfast/tile.h"

using namespace nb::literals;

namespace {

// Not `select`: the C library has one, outside every namespace.
void select_tiles(nb::handle codes, nb::handle equal, nb::handle row_scale, nb::handle threshold,
                  nb::handle x, int code, int tile_rows, nb::handle offset, nb::handle weight,
                  const char* activation, const char* design, nb::handle workspace,
                  nb::handle tiles, nb::handle n_tiles, nb::handle missed, nb::handle cap,
                  nb::handle dropped, uintptr_t stream) {
  Call call("select");
  Size batch{"batch"}, d{"d"}, n{"n_neurons"}, two{"2", 2}, one{"1", 1};
  csfast::SelectParams p{};
  p.x = call.in_type(x, "x", {&batch, &d});
  p.code = code_of(code);
  CodeSizes sizes(p.code, d);
  p.codes = call.in<uint8_t>(codes, "codes", {&n, &two, &sizes.groups, &sizes.bytes});
  p.equal = call.in<float>(equal, "equal", {&d});
  p.row_scale = call.in<float>(row_scale, "row_scale", {&n, &two});
  p.offset = call.in_or_null<float>(offset, "offset", {&n, &two});
  p.weight = call.in_or_null<float>(weight, "weight", {&batch});
  Size& lists = p.weight == nullptr ? batch : one;
  p.threshold = call.in<float>(threshold, "threshold", {&lists});
  Size width{"n_tiles_max", tile_rows > 0 ? csfast::n_tiles_max(n, tile_rows) : -1};
  p.tile = call.out<int32_t>(tiles, "tile", {&lists, &width});
  p.n_tiles = call.out<int32_t>(n_tiles, "n_tiles", {&lists});
  p.missed = call.out<float>(missed, "missed", {&lists});
  p.cap = call.in_or_null<int32_t>(cap, "cap", {&lists});
  if (!dropped.is_none()) p.dropped = call.out<int32_t>(dropped, "dropped", {&lists});
  p.workspace = call.workspace(workspace, csfast::select_workspace(batch, d, n, call.device()));
  p.batch = batch;
  p.d = d;
  p.n_neurons = n;
  p.tile_rows = tile_rows;
  p.dtype = call.dtype();
  p.activation = call.activation(activation);
  p.design = csfast::parse_design("select", design);
  unlocked([&] { csfast::select(p, call.device(), stream_of(stream)); });
}

int64_t select_workspace(int64_t batch, int64_t d, int64_t n_neurons, bool cuda) {
  return csfast::select_workspace(batch, d, n_neurons,
                                  cuda ? csfast::Device::kCuda : csfast::Device::kCpu);
}

}  // namespace

void bind_select(nb::module_& m) {
  m.def(
      "select", &select_tiles, "codes"_a, "equal"_a, "row_scale"_a, "threshold"_a, "x"_a, "code"_a,
      "tile_rows"_a, "offset"_a.none(), "weight"_a.none(), "activation"_a, "design"_a,
      "workspace"_a, "tile"_a, "n_tiles"_a, "missed"_a, "cap"_a.none(), "dropped"_a.none(),
      "stream"_a,
      nb::sig(
          "def select(codes: torch.Tensor, equal: torch.Tensor, row_scale: torch.Tensor, "
          "threshold: torch.Tensor, x: torch.Tensor, code: int, tile_rows: int, "
          "offset: torch.Tensor | None, weight: torch.Tensor | None, activation: str, design: str, "
          "workspace: torch.Tensor, tile: torch.Tensor, n_tiles: torch.Tensor, "
          "missed: torch.Tensor, cap: torch.Tensor | None, dropped: torch.Tensor | None, "
          "stream: int) -> None"));
  m.def("select_workspace", &select_workspace, "batch"_a, "d"_a, "n_neurons"_a, "cuda"_a);
}
