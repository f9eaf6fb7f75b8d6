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
  static constexpr int64_t kSize = 4;
  static __m512 dot(__m512 sum, const char* w, const char* x, Mask mask) {
    return _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, w), _mm512_maskz_loadu_ps(mask, x), sum);
  }
};

struct F16 {
  using Mask = __mmask32;
  static constexpr int64_t kSize = 2;
  static __m512 dot(__m512 sum, const char* w, const char* x, Mask mask) {
    const __m512i ws = _mm512_maskz_loadu_epi16(mask, w);
    const __m512i xs = _mm512_maskz_loadu_epi16(mask, x);
    sum = _mm512_fmadd_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(ws)),
                          _mm512_cvtph_ps(_mm512_castsi512_si256(xs)), sum);
    return _mm512_fmadd_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(ws, 1)),
                           _mm512_cvtph_ps(_mm512_extracti64x4_epi64(xs, 1)), sum);
  }
};

struct BF16 {
  using Mask = __mmask32;
  static constexpr int64_t kSize = 2;
  static __m512 dot(__m512 sum, const char* w, const char* x, Mask mask) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(mask, w),
                            (__m512bh)_mm512_maskz_loadu_epi16(mask, x));
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
