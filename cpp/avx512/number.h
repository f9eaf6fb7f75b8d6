// The number formats, 64 bytes at a time: every product is added in float32.
//
// `mask` has a bit for every element that is there; nothing beyond them is read.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "csfast/types.h"

namespace csfast::avx512 {

struct F32 {
  using Mask = __mmask16;
  using Line = __m512;  // 64 bytes as floats
  static constexpr int64_t kSize = 4;
  static Line load(const char* w, Mask mask) { return _mm512_maskz_loadu_ps(mask, w); }
  static __m512 first(Line w) { return w; }
  static __m512 dot(__m512 sum, const char* w, const char* x, Mask mask) {
    return _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, w), _mm512_maskz_loadu_ps(mask, x), sum);
  }
  template <int kNeurons>
  static void add(float* sum, const __m512* a, const Line* w, Mask mask) {
    __m512 total = _mm512_maskz_loadu_ps(mask, sum);
#pragma GCC unroll 4
    for (int i = 0; i < kNeurons; ++i) total = _mm512_fmadd_ps(a[i], w[i], total);
    _mm512_mask_storeu_ps(sum, mask, total);
  }
  static void store(char* out, __m512 v, __mmask16 mask) { _mm512_mask_storeu_ps(out, mask, v); }
};

// What F16 and BF16 have in common: two floats come out of a word.
struct Halves {
  __m512 lower, upper;
};
template <typename T>
struct Word {
  using Mask = __mmask32;
  using Line = Halves;  // 64 bytes as floats
  static constexpr int64_t kSize = 2;
  static Line load(const char* w, Mask mask) {
    const __m512i words = _mm512_maskz_loadu_epi16(mask, w);
    return {T::widen(_mm512_castsi512_si256(words)), T::widen(_mm512_extracti64x4_epi64(words, 1))};
  }
  static __m512 first(const Line& w) { return w.lower; }  // sixteen floats
  template <int kNeurons>
  static void add(float* sum, const __m512* a, const Line* w, Mask mask) {
    const __mmask16 first = static_cast<__mmask16>(mask);
    const __mmask16 second = static_cast<__mmask16>(mask >> 16);
    __m512 lower = _mm512_maskz_loadu_ps(first, sum);
    __m512 upper = _mm512_maskz_loadu_ps(second, sum + 16);
#pragma GCC unroll 4
    for (int i = 0; i < kNeurons; ++i) {
      lower = _mm512_fmadd_ps(a[i], w[i].lower, lower);
      upper = _mm512_fmadd_ps(a[i], w[i].upper, upper);
    }
    _mm512_mask_storeu_ps(sum, first, lower);
    _mm512_mask_storeu_ps(sum + 16, second, upper);
  }
};

struct F16 : Word<F16> {
  static __m512 widen(__m256i v) { return _mm512_cvtph_ps(v); }
  static __m512 dot(__m512 sum, const char* w, const char* x, Mask mask) {
    const __m512i ws = _mm512_maskz_loadu_epi16(mask, w);
    const __m512i xs = _mm512_maskz_loadu_epi16(mask, x);
    sum =
        _mm512_fmadd_ps(widen(_mm512_castsi512_si256(ws)), widen(_mm512_castsi512_si256(xs)), sum);
    return _mm512_fmadd_ps(widen(_mm512_extracti64x4_epi64(ws, 1)),
                           widen(_mm512_extracti64x4_epi64(xs, 1)), sum);
  }
  static void store(char* out, __m512 v, __mmask16 mask) {
    _mm256_mask_storeu_epi16(out, mask,
                             _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

struct BF16 : Word<BF16> {
  static __m512 widen(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static __m512 dot(__m512 sum, const char* w, const char* x, Mask mask) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(mask, w),
                            (__m512bh)_mm512_maskz_loadu_epi16(mask, x));
  }
  static void store(char* out, __m512 v, __mmask16 mask) {
    _mm256_mask_storeu_epi16(out, mask, (__m256i)_mm512_cvtneps_pbh(v));
  }
};

// Calls f.operator()<T>() with the format that `dtype` names.
template <typename F>
inline void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f.template operator()<F32>();
    case DType::kF16:
      return f.template operator()<F16>();
    case DType::kBF16:
      return f.template operator()<BF16>();
  }
}

}  // namespace csfast::avx512
