// The elements that one load of 16 bytes brings.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>

#include "common/warp.cuh"

namespace csfast::cuda {

template <typename T>
inline constexpr int kVector = 16 / sizeof(T);  // elements of one load
template <typename T>
inline constexpr int kStrip = kWarp * kVector<T>;  // those of a warp's loads

template <typename T>
struct alignas(16) Vector {
  T at[kVector<T>];
};

template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* from) {
  return std::bit_cast<Vector<T>>(__ldg(reinterpret_cast<const uint4*>(from)));
}

}  // namespace csfast::cuda
