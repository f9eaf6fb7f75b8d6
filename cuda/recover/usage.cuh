// How much neurons will matter, from their measurements, and the rule that keeps them: recover.h.
//
// Every rounding is spelled out, so that recover and select agree on every bit.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/activate.cuh"
#include "csfast/types.h"

namespace csfast::cuda {

// One column of a measurement, scaled; `offset` is null or its array, `at` its entry there.
__device__ __forceinline__ float scaled(float scale, float row_scale, float y, const float* offset,
                                        int64_t at) {
  const float v = __fmul_rn(__fmul_rn(scale, row_scale), y);
  return offset == nullptr ? v : __fadd_rn(v, offset[at]);
}

__device__ __forceinline__ float usage_of(Activation activation, float gate, float up) {
  return fabsf(__fmul_rn(activate(activation, gate), up));
}

// Of a group of neighbouring neurons, of which usage(j) tells each one's.
template <typename Usage>
__device__ __forceinline__ float group_usage(int64_t group, int64_t n_neurons, int64_t group_rows,
                                             Usage usage) {
  if (group_rows == 1) return usage(group);
  const int64_t end = min((group + 1) * group_rows, n_neurons);
  float sum = 0.0f;
  for (int64_t j = group * group_rows; j < end; ++j) {
    const float u = usage(j);
    sum = __fadd_rn(sum, __fmul_rn(u, u));
  }
  return __fsqrt_rn(sum);
}

// Of a batch that decides together, of which usage(b) tells each row's.
template <typename Usage>
__device__ __forceinline__ float joint_usage(const float* weight, int64_t batch, Usage usage) {
  float sum = 0.0f;
  for (int64_t b = 0; b < batch; ++b) {
    if (weight[b] != 0.0f) sum = __fadd_rn(sum, __fmul_rn(weight[b], usage(b)));
  }
  return sum;
}

// What overrides a threshold or a budget.
struct Votes {
  bool none;  // no row votes: keep nothing
  bool all;   // the scale of a voting row is not finite: keep everything
};

// Of list `list` in the decisions of a batch, `weight` null, or of the only list. The whole block
// calls it.
__device__ __forceinline__ Votes votes_of(const float* weight, const float* scale, int64_t batch,
                                          int64_t list) {
  if (weight == nullptr) return {.none = false, .all = !isfinite(scale[list])};
  int any = 0;
  int broken = 0;
  for (int64_t b = threadIdx.x; b < batch; b += blockDim.x) {
    if (weight[b] == 0.0f) continue;
    any = 1;
    broken |= !isfinite(scale[b]);
  }
  const bool none = __syncthreads_or(any) == 0;
  return {.none = none, .all = __syncthreads_or(broken) != 0};
}

// What is not a number is kept.
__device__ __forceinline__ bool is_kept(float usage, float threshold, Votes votes) {
  return !votes.none && (votes.all || !(usage < threshold));
}

}  // namespace csfast::cuda
