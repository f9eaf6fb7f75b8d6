// What a gate goes through, on eight floats.
#pragma once

#include <immintrin.h>

#include "csfast/types.h"

namespace csfast::avx2 {

// exp(x) to 2 ulp; infinity above 88.7, 0 below -104, not-a-number stays.
//
// exp(x) = 2^n exp(r), n = rint(x / ln 2), |r| <= ln 2 / 2. ln 2 is taken off in two parts, of
// which the first times n is exact for |n| < 2^9. The polynomial is Taylor's to r^7, whose rest is
// below (ln 2 / 2)^8 / 8! / (1 - ln 2 / 2) = 8e-9, a seventh of an ulp.
inline __m256 exp(__m256 x) {
  // Beyond +-150 nothing changes but n, which must stay below 2^8. x stands second because min and
  // max answer with the second operand when one is not a number.
  x = _mm256_max_ps(_mm256_set1_ps(-150.0f), x);
  x = _mm256_min_ps(_mm256_set1_ps(150.0f), x);
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(0x1.715476p+0f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.62e4p-1f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.7f7d1cp-20f), r);
  __m256 e = _mm256_set1_ps(1.0f / 5040);
  e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(1.0f / 720));
  e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(1.0f / 120));
  e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(1.0f / 24));
  e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(1.0f / 6));
  e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(0.5f));
  e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(1.0f));
  e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(1.0f));
  // 2^n may be no float where the result is one, its halves' powers always are: |n| <= 217. Only
  // the second product rounds.
  const __m256i whole = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const auto power = [](__m256i i) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(i, _mm256_set1_epi32(127)), 23));
  };
  return _mm256_mul_ps(_mm256_mul_ps(e, power(half)), power(_mm256_sub_epi32(whole, half)));
}

// 0.5 (1 + tanh(t)) is 1 / (1 + exp(-2 t)), so gelu_tanh(z) = z / (1 + exp(-z (c1 + c3 z^2))) with
// c1 = 2 sqrt(2/pi) and c3 = 0.044715 c1: right to a few ulp where 1 + tanh cancels.
inline __m256 activate(Activation activation, __m256 z) {
  __m256 w = z;
  if (activation == Activation::kGeluTanh) {
    const __m256 inner =
        _mm256_add_ps(_mm256_set1_ps(1.5957691216057308f),
                      _mm256_mul_ps(_mm256_set1_ps(0.07135481627260025f), _mm256_mul_ps(z, z)));
    w = _mm256_mul_ps(z, inner);
  }
  const __m256 minus_w = _mm256_xor_ps(w, _mm256_set1_ps(-0.0f));
  return _mm256_div_ps(z, _mm256_add_ps(_mm256_set1_ps(1.0f), exp(minus_w)));
}

}  // namespace csfast::avx2
