// Memory and numbers of the benchmarks on the CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace csfast::bench {

inline uint16_t bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // half to even
}

// Memory that starts where a cache line does, as the workspaces want it and tensors have it.
template <typename T>
class Lines {
 public:
  explicit Lines(int64_t size = 0) : size_(size), store_(size * sizeof(T) / sizeof(Line) + 1) {}
  T* data() { return reinterpret_cast<T*>(store_.data()); }
  const T* data() const { return reinterpret_cast<const T*>(store_.data()); }
  int64_t size() const { return size_; }
  T* begin() { return data(); }
  T* end() { return data() + size_; }

 private:
  struct alignas(64) Line {
    unsigned char bytes[64];
  };
  int64_t size_;
  std::vector<Line> store_;
};

}  // namespace csfast::bench
