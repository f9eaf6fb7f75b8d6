// The elements that one load of 16 bytes brings.
#pragma once

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

// The first n elements at `from`, zeros beyond; nothing beyond them is read. If kAligned, `from` is
// a multiple of 16 bytes and n one of a vector.
template <typename T, bool kAligned>
__device__ __forceinline__ Vector<T> load_vector(const T* from, int64_t n) {
  if constexpr (kAligned) {
    if (n > 0) return std::bit_cast<Vector<T>>(__ldg(reinterpret_cast<const uint4*>(from)));
  }
  Vector<T> v;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    v.at[i] = !kAligned && i < n ? from[i] : static_cast<T>(0.0f);
  return v;
}

}  // namespace csfast::cuda
