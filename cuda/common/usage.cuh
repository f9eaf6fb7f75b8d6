// How much a neuron will matter, from its measurements, and the rule that keeps it: recover.h.
#pragma once

#include <cuda_runtime.h>

namespace csfast::cuda {

__device__ __forceinline__ float silu(float g) {
  return __fdiv_rn(g, __fadd_rn(1.0f, expf(-g)));
}

// Every rounding is spelled out, so that recover and select agree on every bit.
__device__ __forceinline__ float usage_of(float scale, float2 row_scale, int y_gate, int y_up) {
  const float g = __fmul_rn(__fmul_rn(scale, row_scale.x), __int2float_rn(y_gate));
  const float u = __fmul_rn(__fmul_rn(scale, row_scale.y), __int2float_rn(y_up));
  return fabsf(__fmul_rn(silu(g), u));
}

// What is not a number is kept.
__device__ __forceinline__ bool is_kept(float usage, float threshold, float scale) {
  return !(usage < threshold) || !isfinite(scale);
}

}  // namespace csfast::cuda
