// How a workspace is cut into arrays.
#pragma once

#include <cstdint>

namespace csfast::cuda {

// Bytes that an array of `bytes` takes, so that the next one is aligned as the workspace is.
constexpr int64_t padded(int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}

template <typename T>
constexpr T* at(void* workspace, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(workspace) + offset);
}

}  // namespace csfast::cuda
