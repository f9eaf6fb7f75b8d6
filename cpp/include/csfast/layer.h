// Layer: a gated feed-forward layer as csfast has it bound. The operations take of it what they
// read, as it is, so that a field stands here and nowhere else.
#pragma once

#include <cstdint>

#include "csfast/planes.h"
#include "csfast/types.h"

namespace csfast {

// What all parts of a layer, and the activations that go through it, have in common.
struct Form {
  int64_t d, n_neurons;
  DType dtype;            // T: of weights, biases, x and out
  Activation activation;  // what the gate goes through
};

// What a layer's neurons are measured by: sense.h.
struct Sensor {
  const uint8_t* codes;    // (n_neurons, 2, groups, group_bytes), see planes.h
  const float* equal;      // (d)
  const float* row_scale;  // (n_neurons, 2)
  const float* offset;     // (n_neurons, 2), or null
  Code code;
};

// What is computed with: execute.h.
struct Weights {
  const void* gate;       // (n_neurons, d), T
  const void* up;         // (n_neurons, d), T
  const void* down_t;     // (n_neurons, d), T: the transposed down projection
  const void* gate_bias;  // (n_neurons), T, or null
  const void* up_bias;    // (n_neurons), T, or null
  const void* down_bias;  // (d), T, or null
};

// Which of its tiles are executed: recover.h, select.h. `lists` is 1 with votes, otherwise batch.
struct Decision {
  const float* threshold;        // (lists): the usage from which a tile is kept
  const float* votes;            // (batch): what each counts, or null: each has a list of its own
  const int32_t* cap = nullptr;  // (lists): the most tiles that each keeps, or null; below 0 is 0
  int tile_rows;                 // neurons of a tile, >= 1
};

struct Layer {
  Form form;
  Sensor sensor;
  Weights weights;
  Decision decision;
};

}  // namespace csfast
