// Shared memory whose size is known at launch.
#pragma once

#include <cuda_runtime.h>

namespace csfast::cuda {

// Its first byte, aligned for every type that kernels load.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char bytes[];
  return bytes;
}

}  // namespace csfast::cuda
