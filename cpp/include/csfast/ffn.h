// Ffn: a complete feed-forward layer, select + execute, as a decode step calls it.
#pragma once

#include <cstdint>

#include "csfast/execute.h"
#include "csfast/select.h"
#include "csfast/types.h"

namespace csfast {

struct FfnParams {
  const uint8_t* codes;    // (n_neurons, 2, groups, group_bytes)
  const float* equal;      // (d)
  const float* row_scale;  // (n_neurons, 2)
  const float* threshold;  // (batch)
  const void* gate;        // (n_neurons, d), T
  const void* up;          // (n_neurons, d), T
  const void* down_t;      // (n_neurons, d), T
  const void* x;           // (batch, d), T
  void* workspace;         // ffn_workspace() bytes, 64-byte aligned
  void* out;               // (batch, d), T, written
  int64_t* stats;          // (2) or null: += batch, += neurons executed; read by nobody on the way
  int64_t batch, d, n_neurons;
  Code code;
  int tile_rows;
  DType dtype;  // T
};

int64_t ffn_workspace(int64_t batch, int64_t d, int64_t n_neurons, Device device);

// Equal to execute(select(x)) bit for bit.
void ffn(const FfnParams& p, Device device, Stream stream);

namespace cuda {
int64_t ffn_workspace(int64_t batch, int64_t d, int64_t n_neurons);
void ffn(const FfnParams& p, Stream stream);
}  // namespace cuda

}  // namespace csfast
