// Execute: the gated feed-forward layer on the neurons of a tile list, nothing else read.
//
//   a[b, j] = silu(gate[j] . x[b]) * (up[j] . x[b])             j in the tiles of row b
//   out[b, :] = sum_j a[b, j] * down_t[j, :]
//
// Sums and a in float32, out rounded to T once. Deterministic: the order of summation depends on
// the tile list and the sizes only, never on the number of threads.
#pragma once

#include <cstdint>

#include "csfast/tile.h"
#include "csfast/types.h"

namespace csfast {

struct ExecuteParams {
  const void* gate;        // (n_neurons, d), T
  const void* up;          // (n_neurons, d), T
  const void* down_t;      // (n_neurons, d), T: the transposed down projection
  const void* x;           // (batch, d), T
  const int32_t* tile;     // (batch, n_tiles_max)
  const int32_t* n_tiles;  // (batch)
  void* workspace;         // execute_workspace() bytes, 64-byte aligned, content irrelevant
  void* out;               // (batch, d), T, written; zeros where the tile list is empty
  int64_t batch, d, n_neurons;
  int tile_rows;
  DType dtype;  // T
};

// Bytes of workspace that execute wants on `device`.
int64_t execute_workspace(int64_t batch, int64_t d, int64_t n_neurons, Device device);

void execute(const ExecuteParams& p, Device device, Stream stream);

namespace cuda {
int64_t execute_workspace(int64_t batch, int64_t d, int64_t n_neurons);
void execute(const ExecuteParams& p, Stream stream);
}  // namespace cuda

}  // namespace csfast
