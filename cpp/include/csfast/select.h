// Select: sense, recover by threshold and tile in one pass; no intermediate leaves the caches.
#pragma once

#include <cstdint>

#include "csfast/planes.h"
#include "csfast/types.h"

namespace csfast {

struct SelectParams {
  const uint8_t* codes;    // (n_neurons, 2, groups, group_bytes)
  const float* equal;      // (d)
  const float* row_scale;  // (n_neurons, 2)
  const float* threshold;  // (batch)
  const void* x;           // (batch, d), T
  void* workspace;         // select_workspace() bytes, 64-byte aligned
  int32_t* tile;           // (batch, n_tiles_max), written up to n_tiles
  int32_t* n_tiles;        // (batch), written
  float* missed;           // (batch), written, or null
  int64_t batch, d, n_neurons;
  Code code;
  int tile_rows;
  DType dtype;  // T
};

int64_t select_workspace(int64_t batch, int64_t d, int64_t n_neurons, Device device);

// Equal to tile(recover(sense(x))) entry for entry.
void select(const SelectParams& p, Device device, Stream stream);

namespace cuda {
int64_t select_workspace(int64_t batch, int64_t d, int64_t n_neurons);
void select(const SelectParams& p, Stream stream);
}  // namespace cuda

}  // namespace csfast
