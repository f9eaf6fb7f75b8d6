#include "csfast/tile.h"

#include "check.h"

namespace csfast {
namespace {

void check(const TileParams& p, Device device) {
  check_neurons("tile", p.batch, p.n_neurons);
  check_group_rows("tile", "tile_rows", p.tile_rows);
  if (device == Device::kCpu) {
    check_lists("tile", "index", p.index, p.count, p.batch, p.n_neurons);
  }
}

void tile_on_cpu(const TileParams& p) {
  const int64_t width = n_tiles_max(p.n_neurons, p.tile_rows);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int32_t* index = p.index + b * p.n_neurons;  // (n_neurons)
    int32_t* tile = p.tile + b * width;                // (n_tiles_max)
    int32_t count = 0;
    for (int32_t i = 0; i < p.count[b]; ++i) {
      const int32_t t = index[i] / p.tile_rows;
      if (count == 0 || tile[count - 1] != t) tile[count++] = t;
    }
    p.n_tiles[b] = count;
  }
}

}  // namespace

void tile(const TileParams& p, Device device, Stream stream) {
  check(p, device);
  if (p.batch == 0) return;
  device == Device::kCuda ? cuda::tile(p, stream) : tile_on_cpu(p);
}

}  // namespace csfast
