// Recover: which neurons, or groups of neighbouring neurons, matter, from the measurements.
//
//   v[b, j, r] = (scale[b] * row_scale[j, r]) * y[b, j, r] + offset[j, r]     r = 0 gate, 1 up
//   usage[b, j] = |act(v[b, j, 0]) * v[b, j, 1]|         of two columns
//   usage[b, j] = |v[b, j, 0]|                           of one column, which has no gate
//
// row_scale[:, 1] and offset[:, 1] already hold the norm of the neuron's down row. Float32
// throughout, every operation rounded; without an offset nothing is added.
//
// A group is group_rows neighbouring neurons, the last one perhaps fewer. Its usage is the root of
// the sum of its neurons' squared usages, added in their order; a group of one has its neuron's
// own. All below is over groups.
//   threshold: keep j unless usage < threshold[b]; a usage or threshold that is not a number keeps.
//   top-k:     keep the budget[b] largest usages; not-a-number ranks as infinity, ties go to the
//              lower index.
// A scale that is not finite keeps everything.
//
// With votes the rows decide together: one list, of the joint usage
//   usage[0, j] = sum_b votes[b] * usage[b, j]           over rows of votes other than 0, in order
// A row of 0 votes has no say, whatever it holds. A voting row whose scale is not finite keeps
// everything; if no row votes, nothing is kept.
#pragma once

#include <cstdint>

#include "csfast/types.h"

namespace csfast {

enum class Rule : uint8_t { kThreshold, kTopK };

// `lists` is 1 with weights, otherwise batch; n_groups = ceil(n_neurons / group_rows).
struct RecoverParams {
  const int32_t* y;        // (batch, n_neurons, columns), or null
  const float* y_float;    // likewise; exactly one of the two is given
  const float* scale;      // (batch)
  const float* row_scale;  // (n_neurons, columns)
  const float* offset;     // (n_neurons, columns), or null
  const float* votes;      // (batch), none negative, or null: every row decides for itself
  const float* threshold;  // (lists), for kThreshold
  const int32_t* budget;   // (lists), each in [0, n_groups], for kTopK
  float* usage;            // (lists, n_groups), written
  int32_t* index;          // (lists, n_groups), written up to count, ascending
  int32_t* count;          // (lists), written
  float* missed;           // (lists), written: sum of usage^2 over what was not kept
  int64_t batch, n_neurons;
  int columns;  // 1 or 2
  int group_rows;
  Rule rule;
  Activation activation;  // of no account for one column
};

constexpr int64_t n_groups(int64_t n_neurons, int group_rows) {
  return (n_neurons + group_rows - 1) / group_rows;
}

// Throws std::invalid_argument for sizes that make no sense, BackendError if the device fails.
// Asynchronous on CUDA.
void recover(const RecoverParams& p, Device device, Stream stream);

namespace cuda {
void recover(const RecoverParams& p, Stream stream);
}

}  // namespace csfast
