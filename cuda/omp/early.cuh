// Loads that stay where they are written: the compiler puts others off until it is certain that
// somebody wants them.
#pragma once

#include <cuda_runtime.h>

namespace csfast::cuda {

// From memory that nobody writes, aligned as a whole.
__device__ __forceinline__ void load_early(const float* from, float (&v)[4]) {
  asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "l"(from));
}

}  // namespace csfast::cuda
