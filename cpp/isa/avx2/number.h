// The number formats, eight values at a time: every load gives float32, every store rounds once.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "csfast/types.h"

namespace csfast::avx2 {

struct F32 {
  static constexpr int64_t kSize = 4;
  static __m256 load(const char* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
  static void store(char* p, __m256 v) { _mm256_storeu_ps(reinterpret_cast<float*>(p), v); }
};

struct F16 {
  static constexpr int64_t kSize = 2;
  static __m256 load(const char* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(char* p, __m256 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

struct BF16 {
  static constexpr int64_t kSize = 2;
  static __m256 load(const char* p) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
  }
  static void store(char* p, __m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i upper = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd);  // half to even
    const __m256i number = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i none = _mm256_or_si256(upper, _mm256_set1_epi32(0x0040));
    const __m256i is_none = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(number, none, is_none);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(p),
        _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }
};

// The first n values at p, zeros beyond the eighth at most. Nothing beyond them is read.
template <typename T>
inline __m256 load(const char* p, int64_t n) {
  if (n >= 8) return T::load(p);
  char part[8 * T::kSize] = {};
  std::memcpy(part, p, n * T::kSize);
  return T::load(part);
}

// Nothing beyond the first n values at p is written.
template <typename T>
inline void store(char* p, __m256 v, int64_t n) {
  if (n >= 8) return T::store(p, v);
  char part[8 * T::kSize];
  T::store(part, v);
  std::memcpy(p, part, n * T::kSize);
}

inline float sum_of(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Calls f.operator()<T>() with the format that `dtype` names.
template <typename F>
inline auto dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f.template operator()<F32>();
    case DType::kF16:
      return f.template operator()<F16>();
    default:
      return f.template operator()<BF16>();
  }
}

}  // namespace csfast::avx2
