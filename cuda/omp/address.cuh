// Shared memory by address, for kernels that cannot wait for the machine to make an address of a
// pointer again and again. What is loaded and stored so is in the order written, as all of it is
// volatile.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/shared.cuh"
#include "common/warp.cuh"

namespace csfast::cuda {

using SharedAddress = uint32_t;

// By a whole warp. Of what a lane of it says, the compiler cannot make the address anew.
__device__ __forceinline__ SharedAddress shared_begin() {
  const auto begin = static_cast<SharedAddress>(__cvta_generic_to_shared(dynamic_shared()));
  return __shfl_sync(kFull, begin, 0);
}

__device__ __forceinline__ void load_shared(SharedAddress from, float& v) {
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(from) : "memory");
}

__device__ __forceinline__ void load_shared(SharedAddress from, float (&v)[4]) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void load_shared(SharedAddress from, unsigned& first, int& second) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
               : "=r"(first), "=r"(second)
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void store_shared(SharedAddress to, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(v) : "memory");
}

__device__ __forceinline__ void store_shared(SharedAddress to, const float (&v)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(v[0]), "f"(v[1]),
               "f"(v[2]), "f"(v[3])
               : "memory");
}

// Where `when` says so, without a branch.
__device__ __forceinline__ void store_shared_if(bool when, SharedAddress to, const float4& v) {
  asm volatile(
      "{\n"
      ".reg .pred when;\n"
      "setp.ne.u32 when, %5, 0;\n"
      "@when st.shared.v4.f32 [%0], {%1, %2, %3, %4};\n"
      "}" ::"r"(to),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(static_cast<unsigned>(when))
      : "memory");
}

}  // namespace csfast::cuda
