// Execute: the gated feed-forward layer on the neurons of a tile list, nothing else read.
//
//   a[b, j] = act(gate[j] . x[b] + gate_bias[j]) * (up[j] . x[b] + up_bias[j])     j in the tiles
//   out[b, :] = sum_j a[b, j] * down_t[j, :] + down_bias                           of row b
//
// Sums and a in float32, out rounded to T once. Deterministic: the order of summation depends on
// the tile list, the sizes and the machine, never on the number of threads or on the rest of the
// batch.
#pragma once

#include <cstdint>

#include "csfast/design.h"
#include "csfast/layer.h"
#include "csfast/tile.h"
#include "csfast/types.h"

namespace csfast {

struct ExecuteParams {
  Form form;
  Weights weights;
  const void* x;           // (batch, d), T
  const int32_t* tile;     // (lists, n_tiles_max)
  const int32_t* n_tiles;  // (lists)
  void* workspace;         // execute_workspace() bytes, 64-byte aligned, content irrelevant
  void* out;               // (batch, d), T, written; the bias or zeros where the list is empty
  int64_t batch;
  int tile_rows;
  bool shared;  // one list for all rows: lists is 1, otherwise batch
  Design design = {};
};

// Bytes of workspace that execute wants on `device`.
int64_t execute_workspace(int64_t batch, int64_t d, int64_t n_neurons, Device device);

// Throws std::invalid_argument for sizes that make no sense or, on CUDA, a design that does not
// fit; BackendError if the device fails. Asynchronous on CUDA.
void execute(const ExecuteParams& p, Device device, Stream stream);

// How CUDA goes about it on `chip`. Looks at sizes and addresses, not at memory. `senses`: the list
// is one that select makes just before, run by run.
Chosen choose(const ExecuteParams& p, const Chip& chip, bool senses = false);

namespace cuda {
int64_t execute_workspace(int64_t batch, int64_t d, int64_t n_neurons);
void execute(const ExecuteParams& p, Stream stream);
}  // namespace cuda

}  // namespace csfast
