#include "csfast/select.h"

#include "call.h"
#include "csfast/tile.h"
#include "layer.h"

using namespace nb::literals;

namespace {

// Not `select`: the C library has one, outside every namespace.
void select_tiles(nb::handle codes, nb::handle equal, nb::handle row_scale, nb::handle threshold,
                  nb::handle x, int code, int tile_rows, nb::handle offset, nb::handle votes,
                  const char* activation, const char* design, nb::handle cap, nb::handle workspace,
                  nb::handle tiles, nb::handle n_tiles, nb::handle missed, nb::handle dropped,
                  uintptr_t stream) {
  Call call("select");
  LayerSizes sizes;
  csfast::SelectParams p{};
  p.x = call.in_type(x, "x", {&sizes.batch, &sizes.d});
  p.sensor = unpack(call, sizes, SensorArgs{codes, equal, row_scale, offset, code});
  Size& lists = sizes.lists(votes);
  p.decision = unpack(call, sizes, lists, {threshold, votes, cap, tile_rows});
  p.form = form_of(call, sizes, activation);
  Size width{"n_tiles_max", tile_rows > 0 ? csfast::n_tiles_max(sizes.n, tile_rows) : -1};
  p.tile = call.out<int32_t>(tiles, "tile", {&lists, &width});
  p.n_tiles = call.out<int32_t>(n_tiles, "n_tiles", {&lists});
  p.missed = call.out<float>(missed, "missed", {&lists});
  if (!dropped.is_none()) p.dropped = call.out<int32_t>(dropped, "dropped", {&lists});
  p.workspace = call.workspace(
      workspace, csfast::select_workspace(sizes.batch, sizes.d, sizes.n, call.device()));
  p.batch = sizes.batch;
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
      "tile_rows"_a, "offset"_a.none(), "votes"_a.none(), "activation"_a, "design"_a,
      "cap"_a.none(), "workspace"_a, "tile"_a, "n_tiles"_a, "missed"_a, "dropped"_a.none(),
      "stream"_a,
      nb::sig(
          "def select(codes: torch.Tensor, equal: torch.Tensor, row_scale: torch.Tensor, "
          "threshold: torch.Tensor, x: torch.Tensor, code: int, tile_rows: int, "
          "offset: torch.Tensor | None, votes: torch.Tensor | None, activation: str, design: str, "
          "cap: torch.Tensor | None, workspace: torch.Tensor, tile: torch.Tensor, "
          "n_tiles: torch.Tensor, missed: torch.Tensor, dropped: torch.Tensor | None, "
          "stream: int) -> None"));
  m.def("select_workspace", &select_workspace, "batch"_a, "d"_a, "n_neurons"_a, "cuda"_a);
}
