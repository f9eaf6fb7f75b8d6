// Planes of bits, a chunk of 128 codes at a time, a byte each.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "csfast/planes.h"

namespace csfast::avx2 {

inline constexpr int64_t kAhead =
    4096;  // bytes: one page, at whose end the processor's own prefetch stops

struct Codes {
  __m256i part[4];  // channels 32 s .. 32 s + 31 of a chunk
};

inline __m256i load_bytes(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

inline Codes pairs(const uint8_t* p) {
  const __m256i all = load_bytes(p);
  const __m256i three = _mm256_set1_epi8(3);
  return {{_mm256_and_si256(all, three), _mm256_and_si256(_mm256_srli_epi16(all, 2), three),
           _mm256_and_si256(_mm256_srli_epi16(all, 4), three),
           _mm256_and_si256(_mm256_srli_epi16(all, 6), three)}};
}

// Sixteen bytes of single bits, each worth `value`.
inline Codes singles(const uint8_t* p, int8_t value) {
  const __m256i all =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202,
                                          0x0303030303030303);  // of each channel
  Codes codes;
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s) {
    const __m256i from = _mm256_add_epi8(byte, _mm256_set1_epi8(static_cast<int8_t>(4 * s)));
    const __m256i found = _mm256_and_si256(_mm256_shuffle_epi8(all, from), bit);
    codes.part[s] = _mm256_and_si256(_mm256_cmpeq_epi8(found, bit), _mm256_set1_epi8(value));
  }
  return codes;
}

template <int kBits>
inline Codes decode(const uint8_t* p) {
  if constexpr (kBits == 1) return singles(p, 1);
  Codes codes = pairs(p);
  if constexpr (kBits > 2) {
    const Codes high = kBits == 3 ? singles(p + 32, 4) : pairs(p + 32);
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      // A code is below 4, so shifting words never crosses a byte.
      const __m256i shifted = kBits == 3 ? high.part[s] : _mm256_slli_epi16(high.part[s], 2);
      codes.part[s] = _mm256_or_si256(codes.part[s], shifted);
    }
  }
  return codes;
}

}  // namespace csfast::avx2
