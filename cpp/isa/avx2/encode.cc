// The search for the best path with AVX2: the lanes are two registers.
#include "csfast/encode.h"

#include <immintrin.h>

#include <utility>

#include "loops.h"

namespace csfast::avx2 {
namespace {

struct Lanes {
  __m256 low, high;
};
using Less = Lanes;

Lanes load(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
void store(float* p, Lanes x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}
Lanes all(float x) {
  return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
Lanes add(Lanes a, Lanes b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
Lanes subtract(Lanes a, Lanes b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
Lanes multiply(Lanes a, Lanes b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
Less is_less(Lanes a, Lanes b) {
  return {_mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ)};
}
Lanes choose(Less less, Lanes a, Lanes b) {
  return {_mm256_blendv_ps(b.low, a.low, less.low), _mm256_blendv_ps(b.high, a.high, less.high)};
}
uint16_t mask_of(Less less) {
  return static_cast<uint16_t>(_mm256_movemask_ps(less.low) | _mm256_movemask_ps(less.high) << 8);
}

}  // namespace

#include "isa/viterbi.inc"

}  // namespace csfast::avx2
