// Ffn: a complete feed-forward layer, select + execute, as a decode step calls it.
#pragma once

#include <cstdint>

#include "csfast/design.h"
#include "csfast/execute.h"
#include "csfast/select.h"
#include "csfast/types.h"

namespace csfast {

struct FfnParams {
  const uint8_t* codes;    // (n_neurons, 2, groups, group_bytes)
  const float* equal;      // (d)
  const float* row_scale;  // (n_neurons, 2)
  const float* offset;     // (n_neurons, 2), or null
  const float* weight;     // (batch), or null: every row has a support of its own, see recover.h
  const float* threshold;  // (batch); with weights only the first is read
  const int32_t* cap = nullptr;  // likewise: the most tiles that a row keeps, see select.h; or null
  const void* gate;              // (n_neurons, d), T
  const void* up;                // (n_neurons, d), T
  const void* down_t;            // (n_neurons, d), T
  const void* gate_bias;         // (n_neurons), T, or null
  const void* up_bias;           // (n_neurons), T, or null
  const void* down_bias;         // (d), T, or null
  const void* x;                 // (batch, d), T
  void* workspace;               // ffn_workspace() bytes, 64-byte aligned
  void* out;                     // (batch, d), T, written
  int64_t* stats;                // (2) or null: += batch, += neurons executed, in all its rows
  int64_t* dropped = nullptr;    // (1) or null: += tiles that only the cap left out
  int64_t batch, d, n_neurons;
  Code code;
  int tile_rows;
  DType dtype;  // T
  Activation activation;
  Design design = {};
};

int64_t ffn_workspace(int64_t batch, int64_t d, int64_t n_neurons, Device device);

// Equal to execute(select(x)) bit for bit.
void ffn(const FfnParams& p, Device device, Stream stream);

namespace cuda {
int64_t ffn_workspace(int64_t batch, int64_t d, int64_t n_neurons);
void ffn(const FfnParams& p, Stream stream);
}  // namespace cuda

}  // namespace csfast
