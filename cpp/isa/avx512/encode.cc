// The search for the best path with AVX-512: the lanes are one register.
#include "csfast/encode.h"

#include <immintrin.h>

#include <utility>

#include "loops.h"

namespace csfast::avx512 {
namespace {

using Lanes = __m512;
using Less = __mmask16;

Lanes load(const float* p) {
  return _mm512_loadu_ps(p);
}
void store(float* p, Lanes x) {
  _mm512_storeu_ps(p, x);
}
Lanes all(float x) {
  return _mm512_set1_ps(x);
}
Lanes add(Lanes a, Lanes b) {
  return _mm512_add_ps(a, b);
}
Lanes subtract(Lanes a, Lanes b) {
  return _mm512_sub_ps(a, b);
}
Lanes multiply(Lanes a, Lanes b) {
  return _mm512_mul_ps(a, b);
}
Less is_less(Lanes a, Lanes b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ);
}
Lanes choose(Less less, Lanes a, Lanes b) {
  return _mm512_mask_blend_ps(less, b, a);
}
uint16_t mask_of(Less less) {
  return less;
}

}  // namespace

#include "isa/viterbi.inc"

}  // namespace csfast::avx512
