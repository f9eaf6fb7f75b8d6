// What a gate goes through, on sixteen floats.
#pragma once

#include <immintrin.h>

#include "csfast/types.h"

namespace csfast::avx512 {

// exp(x) to 2 ulp; infinity above 88.7, 0 below -104, not-a-number stays.
//
// exp(x) = 2^n exp(r), n = rint(x / ln 2), |r| <= ln 2 / 2. ln 2 is taken off in two parts, of
// which the first times n is exact for |n| < 2^9. The polynomial is Taylor's to r^7, whose rest is
// below (ln 2 / 2)^8 / 8! / (1 - ln 2 / 2) = 8e-9, a seventh of an ulp.
inline __m512 exp(__m512 x) {
  // Beyond +-150 nothing changes but the multiplications below, which would overflow. x stands
  // second because min and max answer with the second operand when one is not a number.
  x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);
  x = _mm512_min_ps(_mm512_set1_ps(150.0f), x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e4p-1f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
  __m512 e = _mm512_set1_ps(1.0f / 5040);
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f / 720));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f / 120));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f / 24));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f / 6));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(0.5f));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(e, n);
}

// 0.5 (1 + tanh(t)) is 1 / (1 + exp(-2 t)), so gelu_tanh(z) = z / (1 + exp(-z (c1 + c3 z^2))) with
// c1 = 2 sqrt(2/pi) and c3 = 0.044715 c1: right to a few ulp where 1 + tanh cancels.
inline __m512 activate(Activation activation, __m512 z) {
  __m512 w = z;
  if (activation == Activation::kGeluTanh) {
    const __m512 inner =
        _mm512_add_ps(_mm512_set1_ps(1.5957691216057308f),
                      _mm512_mul_ps(_mm512_set1_ps(0.07135481627260025f), _mm512_mul_ps(z, z)));
    w = _mm512_mul_ps(z, inner);
  }
  const __m512 minus_w = _mm512_xor_ps(w, _mm512_set1_ps(-0.0f));
  return _mm512_div_ps(z, _mm512_add_ps(_mm512_set1_ps(1.0f), exp(minus_w)));
}

}  // namespace csfast::avx512
