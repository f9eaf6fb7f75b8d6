// Planes of bits, a chunk of 128 codes at a time, a byte each.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "csfast/planes.h"

namespace csfast::avx512 {

inline constexpr int64_t kAhead =
    4096;  // bytes: one page, at whose end the processor's own prefetch stops

struct Codes {
  __m512i half[2];  // channels 0 .. 63 and 64 .. 127 of a chunk
};

// The codes of 32 bytes times kTimes, 1 or 2. What a rotation brings in from the other end of its
// word the mask takes away.
template <int kTimes>
inline Codes pairs(const uint8_t* p) {
  const __m512i both =
      _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  constexpr int kLeft = kTimes - 1;
  const __m512i by_0_2 =
      _mm512_inserti64x4(_mm512_set1_epi32(kLeft), _mm256_set1_epi32((kLeft - 2 + 32) % 32), 1);
  const __m512i by_4_6 = _mm512_inserti64x4(_mm512_set1_epi32((kLeft - 4 + 32) % 32),
                                            _mm256_set1_epi32((kLeft - 6 + 32) % 32), 1);
  const __m512i mask = _mm512_set1_epi8(3 * kTimes);
  return {{_mm512_and_si512(_mm512_rolv_epi32(both, by_0_2), mask),
           _mm512_and_si512(_mm512_rolv_epi32(both, by_4_6), mask)}};
}

inline __mmask64 bits_at(const uint8_t* p) {
  return _load_mask64(reinterpret_cast<__mmask64*>(const_cast<uint8_t*>(p)));
}

// The codes of a chunk times kTimes, 1 or 2.
template <int kBits, int kTimes>
inline Codes decode(const uint8_t* p) {
  if constexpr (kBits == 1) {
    return {{_mm512_maskz_set1_epi8(bits_at(p), kTimes),
             _mm512_maskz_set1_epi8(bits_at(p + 8), kTimes)}};
  }
  Codes codes = pairs<kTimes>(p);
  if constexpr (kBits == 3) {
    const __m512i four = _mm512_set1_epi8(4 * kTimes);
    codes.half[0] = _mm512_mask_add_epi8(codes.half[0], bits_at(p + 32), codes.half[0], four);
    codes.half[1] = _mm512_mask_add_epi8(codes.half[1], bits_at(p + 40), codes.half[1], four);
  }
  if constexpr (kBits == 4) {  // a pair takes three bits, so shifting words never crosses a byte
    const Codes high = pairs<kTimes>(p + 32);
    codes.half[0] = _mm512_or_si512(codes.half[0], _mm512_slli_epi16(high.half[0], 2));
    codes.half[1] = _mm512_or_si512(codes.half[1], _mm512_slli_epi16(high.half[1], 2));
  }
  return codes;
}

inline __m512i load_q(const int8_t* q) {
  return _mm512_loadu_si512(q);
}

}  // namespace csfast::avx512
