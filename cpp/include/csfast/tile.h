// Tile: from a support of neurons to the blocks of weights that are read as one.
//
//   tile[b, :] = ascending, distinct values of index[b, i] / tile_rows, i < count[b]
//
// Tile t stands for neurons t * tile_rows .. min((t + 1) * tile_rows, n_neurons) - 1.
#pragma once

#include <cstdint>

#include "csfast/types.h"

namespace csfast {

struct TileParams {
  const int32_t* index;  // (batch, n_neurons), ascending up to count
  const int32_t* count;  // (batch)
  int32_t* tile;         // (batch, n_tiles_max), written up to n_tiles
  int32_t* n_tiles;      // (batch), written
  int64_t batch, n_neurons;
  int tile_rows;  // >= 1; n_tiles_max = ceil(n_neurons / tile_rows)
};

constexpr int64_t n_tiles_max(int64_t n_neurons, int tile_rows) {
  return (n_neurons + tile_rows - 1) / tile_rows;
}

void tile(const TileParams& p, Device device, Stream stream);

namespace cuda {
void tile(const TileParams& p, Stream stream);
}

}  // namespace csfast
