// What the lanes of a warp, and the warps of a block, do together.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/sizes.h"

namespace csfast::cuda {

inline constexpr unsigned kFull = 0xffffffffu;  // every lane

// The sum over the lanes, in every lane, always in the same order.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kFull, v, offset);
  return v;
}

}  // namespace csfast::cuda
