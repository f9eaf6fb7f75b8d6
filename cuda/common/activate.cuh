// What a gate goes through, every rounding spelled out: whoever estimates an activation and whoever
// computes it agree on every bit.
#pragma once

#include <cuda_runtime.h>

#include "csfast/types.h"

namespace csfast::cuda {

// 0.5 (1 + tanh(t)) is 1 / (1 + exp(-2 t)), so gelu_tanh(z) = z / (1 + exp(-z (c1 + c3 z^2))) with
// c1 = 2 sqrt(2/pi) and c3 = 0.044715 c1: right to a few ulp where 1 + tanh cancels.
__device__ __forceinline__ float activate(Activation activation, float z) {
  float w = z;
  if (activation == Activation::kGeluTanh) {
    const float cubic = __fmul_rn(0.07135481627260025f, __fmul_rn(z, z));
    w = __fmul_rn(z, __fadd_rn(1.5957691216057308f, cubic));
  }
  return __fdiv_rn(z, __fadd_rn(1.0f, expf(-w)));
}

}  // namespace csfast::cuda
