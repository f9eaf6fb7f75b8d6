// The reciprocal of a square root, correctly rounded, without a branch.
#pragma once

#include <cuda_runtime.h>

namespace csfast::cuda {

// Off by less than 2^-22.9 of it (PTX), for normal v > 0.
__device__ __forceinline__ float approximate_root(float v) {
  float root;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(v));
  return root;
}

// 1 / sqrt(v) of a finite v > 0, as __frsqrt_rn() gives it; of others anything. That it is
// correctly rounded was tried for every mantissa and approximations that are off by that much.
__device__ __forceinline__ float reciprocal_root(float v) {
  constexpr float kNormal = 0x1p-126f;
  const bool is_small = v < kNormal;
  const int bits = __float_as_int(is_small ? v * 0x1p24f : v);
  // Times an even power of two: from 1/2 up to 2.
  const int scaled = (bits & 0x00ffffff) | 0x3f000000;
  const float m = __int_as_float(scaled);
  const float root = approximate_root(m);
  const float square = __fmul_rn(root, root);
  const float rest = __fmaf_rn(root, root, -square);
  const float error = __fmaf_rn(-m, rest, __fmaf_rn(-m, square, 1.0f));
  const float better = __fmaf_rn(__fmaf_rn(error, 0.375f, 0.5f), __fmul_rn(root, error), root);
  const int back = ((scaled - bits) >> 1) + (is_small ? 12 << 23 : 0);
  return __int_as_float(__float_as_int(better) + back);
}

}  // namespace csfast::cuda
