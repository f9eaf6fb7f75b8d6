// The number formats, 64 bytes at a time: every product is added in float32.
//
// `mask` has a bit for every element that is there; nothing beyond them is read.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "csfast/types.h"

namespace csfast::avx512 {

// 64 bytes of a row as floats: the elements in order if not all are there, else as T::widen has
// them.
template <typename T>
struct Line {
  __m512 part[T::kParts];
};

struct F32 {
  using Mask = __mmask16;
  static constexpr Mask kAll = 0xffff;
  static constexpr int64_t kSize = 4;
  static constexpr int kParts = 1;
  static __m512 load(const char* w, Mask mask) {
    return mask == kAll ? _mm512_loadu_ps(w) : _mm512_maskz_loadu_ps(mask, w);
  }
  static Line<F32> widen(__m512 w) { return {{w}}; }
  static Line<F32> in_order(const Line<F32>& w) { return w; }
  static __m512 dot(__m512 sum, const char* w, const char* x, Mask mask) {
    return _mm512_fmadd_ps(load(w, mask), load(x, mask), sum);
  }
  static void store(char* out, __m512 v, __mmask16 mask) { _mm512_mask_storeu_ps(out, mask, v); }
};

// What F16 and BF16 have in common.
struct Word {
  using Mask = __mmask32;
  static constexpr Mask kAll = 0xffffffff;
  static constexpr int64_t kSize = 2;
  static constexpr int kParts = 2;
  static __m512i load(const char* w, Mask mask) {
    return mask == kAll ? _mm512_loadu_si512(w) : _mm512_maskz_loadu_epi16(mask, w);
  }
};

struct F16 : Word {
  static Line<F16> widen(__m512i w) {
    return {{_mm512_cvtph_ps(_mm512_castsi512_si256(w)),
             _mm512_cvtph_ps(_mm512_extracti64x4_epi64(w, 1))}};
  }
  static Line<F16> in_order(const Line<F16>& w) { return w; }
  static __m512 dot(__m512 sum, const char* w, const char* x, Mask mask) {
    const Line<F16> ws = widen(load(w, mask));
    const Line<F16> xs = widen(load(x, mask));
    sum = _mm512_fmadd_ps(ws.part[0], xs.part[0], sum);
    return _mm512_fmadd_ps(ws.part[1], xs.part[1], sum);
  }
  static void store(char* out, __m512 v, __mmask16 mask) {
    _mm256_mask_storeu_epi16(out, mask,
                             _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

struct BF16 : Word {
  // The even elements, then the odd ones: nothing crosses a lane, so it costs half of the order.
  static Line<BF16> widen(__m512i w) {
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)),
             _mm512_castsi512_ps(
                 _mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000))))}};
  }
  static Line<BF16> in_order(const Line<BF16>& w) {
    const __m512i lower = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
    return {{_mm512_permutex2var_ps(w.part[0], lower, w.part[1]),
             _mm512_permutex2var_ps(w.part[0], upper, w.part[1])}};
  }
  static __m512 dot(__m512 sum, const char* w, const char* x, Mask mask) {
    return _mm512_dpbf16_ps(sum, (__m512bh)load(w, mask), (__m512bh)load(x, mask));
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
