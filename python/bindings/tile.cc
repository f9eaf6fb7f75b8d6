#include "csfast/tile.h"

#include "call.h"

using namespace nb::literals;

namespace {

void tile(nb::handle index, nb::handle count, int tile_rows, nb::handle tiles, nb::handle n_tiles,
          uintptr_t stream) {
  Call call("tile");
  Size batch{"batch"}, n{"n_neurons"};
  csfast::TileParams p{};
  p.index = call.in<int32_t>(index, "index", {&batch, &n});
  p.count = call.in<int32_t>(count, "count", {&batch});
  Size width{"n_tiles_max", tile_rows > 0 ? csfast::n_tiles_max(n, tile_rows) : -1};
  p.tile = call.out<int32_t>(tiles, "tile", {&batch, &width});
  p.n_tiles = call.out<int32_t>(n_tiles, "n_tiles", {&batch});
  p.batch = batch;
  p.n_neurons = n;
  p.tile_rows = tile_rows;
  unlocked([&] { csfast::tile(p, call.device(), stream_of(stream)); });
}

}  // namespace

void bind_tile(nb::module_& m) {
  m.def("tile", &tile, "index"_a, "count"_a, "tile_rows"_a, "tile"_a, "n_tiles"_a, "stream"_a,
        nb::sig("def tile(index: torch.Tensor, count: torch.Tensor, tile_rows: int, "
                "tile: torch.Tensor, n_tiles: torch.Tensor, stream: int) -> None"));
}
