// Planes of bits against activations, half a chunk of 64 channels at a time.
#pragma once

#include <cstdint>

#include "csfast/planes.h"

namespace csfast::base {

inline constexpr int kHalf = 64;  // channels

// The two-bit codes of one half of 32 bytes.
inline int32_t dot_pairs(const uint8_t* p, int half, const int8_t* q) {
  int32_t acc = 0;
  for (int s = 0; s < 2; ++s) {
    for (int m = 0; m < 32; ++m) acc += (p[m] >> (4 * half + 2 * s) & 3) * q[32 * s + m];
  }
  return acc;
}

// The one-bit codes of one half of 16 bytes.
inline int32_t dot_bits(const uint8_t* p, int half, const int8_t* q) {
  int32_t acc = 0;
  for (int m = 0; m < 8; ++m) {
    for (int i = 0; i < 8; ++i) acc += (p[8 * half + m] >> i & 1) * q[8 * m + i];
  }
  return acc;
}

// The codes of one half of a chunk, `half` 0 or 1, against its own activations (kHalf).
inline int32_t dot_half(const uint8_t* chunk, int bits, int half, const int8_t* q) {
  if (bits == 1) return dot_bits(chunk, half, q);
  const int32_t low = dot_pairs(chunk, half, q);
  if (bits == 2) return low;
  return low + 4 * (bits == 3 ? dot_bits(chunk + 32, half, q) : dot_pairs(chunk + 32, half, q));
}

inline int32_t sum_of(const int8_t* q, int64_t n) {
  int32_t total = 0;
  for (int64_t c = 0; c < n; ++c) total += q[c];
  return total;
}

}  // namespace csfast::base
