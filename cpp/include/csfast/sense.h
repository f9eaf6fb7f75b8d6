// Sense: few-bit measurements of every neuron's own rows, exact in integers.
//
//   e[b, c] = x[b, c] * equal[c]                          float32, rounded once
//   scale[b] = max_c |e[b, c]| / 127                      float32
//   q[b, c] = rint(e[b, c] * (127 / max_c |e[b, c]|))     half to even, clamped to [-127, 127]
//   y[b, j, r] = sum_c level(code[j, r, c]) q[b, c]      r = 0 gate, 1 up; level as in planes.h
//
// `equal` evens out the channels (a massive one would otherwise leave the others no bits); its
// inverse is folded into the codes. A row of x that is all zero has scale 0; one that is not finite
// has scale NaN and q = 0, and recovery then keeps every neuron.
#pragma once

#include <cstdint>

#include "csfast/planes.h"
#include "csfast/types.h"

namespace csfast {

struct SenseParams {
  const uint8_t* codes;  // (n_neurons, 2, groups, group_bytes), see planes.h
  const float* equal;    // (d)
  const void* x;         // (batch, d), T
  int8_t* q;             // (batch, q_width), written; zero beyond d
  int32_t* y;            // (batch, n_neurons, 2), written
  float* scale;          // (batch), written
  int64_t batch, d, n_neurons;
  Code code;
  DType dtype;  // T
};

// Throws std::invalid_argument if the sizes make no sense or y could overflow, BackendError if the
// device fails. Asynchronous on CUDA.
void sense(const SenseParams& p, Device device, Stream stream);

namespace cuda {
void sense(const SenseParams& p, Stream stream);
}

}  // namespace csfast
