// Recover: which neurons matter, from the measurements.
//
//   usage[b, j] = |silu(g) * u|,  g = scale[b] * row_scale[j, 0] * y[b, j, 0],
//                                 u = scale[b] * row_scale[j, 1] * y[b, j, 1]
//
// row_scale[:, 1] already holds the norm of the neuron's down row. Float32 throughout.
//   threshold: keep j unless usage < threshold[b]; a usage or threshold that is not a number keeps.
//   top-k:     keep the budget[b] largest usages; not-a-number ranks as infinity, ties go to the
//              lower index.
// A scale that is not finite keeps every neuron.
#pragma once

#include <cstdint>

#include "csfast/types.h"

namespace csfast {

enum class Rule : uint8_t { kThreshold, kTopK };

struct RecoverParams {
  const int32_t* y;        // (batch, n_neurons, 2)
  const float* scale;      // (batch)
  const float* row_scale;  // (n_neurons, 2)
  const float* threshold;  // (batch), for kThreshold
  const int32_t* budget;   // (batch), each in [0, n_neurons], for kTopK
  float* usage;            // (batch, n_neurons), written
  int32_t* index;          // (batch, n_neurons), written up to count, ascending
  int32_t* count;          // (batch), written
  float* missed;           // (batch), written: sum of usage^2 over what was not kept
  int64_t batch, n_neurons;
  Rule rule;
};

// Throws std::invalid_argument for sizes that make no sense, BackendError if the device fails.
// Asynchronous on CUDA.
void recover(const RecoverParams& p, Device device, Stream stream);

namespace cuda {
void recover(const RecoverParams& p, Stream stream);
}

}  // namespace csfast
