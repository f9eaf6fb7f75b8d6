// Shared memory whose size is known at launch.
#pragma once

namespace csfast::cuda {

// Its first byte, aligned for every type that kernels load.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  return shared_bytes;
}

}  // namespace csfast::cuda
