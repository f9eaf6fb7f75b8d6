// Omp sixteen atoms at a time.
#include "csfast/omp.h"

#include <immintrin.h>

#include <algorithm>

#include "loops.h"

namespace csfast::avx512 {
namespace {

__mmask16 first(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1);
}

// c -= step * rows, kRows of them: correlations are then loaded and stored that much less often.
template <int kRows>
void pass(const float* gram, int64_t n, const int32_t* row, const float* step, float* c) {
  const float* r[kRows];
  __m512 s[kRows];
  for (int k = 0; k < kRows; ++k) {
    r[k] = gram + row[k] * n;
    s[k] = _mm512_set1_ps(step[k]);
  }
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 valid = first(n - j);
    __m512 sum = _mm512_maskz_loadu_ps(valid, c + j);
    for (int k = 0; k < kRows; ++k) {
      sum = _mm512_fnmadd_ps(s[k], _mm512_maskz_loadu_ps(valid, r[k] + j), sum);
    }
    _mm512_mask_storeu_ps(c + j, valid, sum);
  }
}

}  // namespace

int32_t subtract(const float* gram, int64_t n, const int32_t* row, const float* step, int64_t rows,
                 const float* weight, float* c) noexcept {
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) pass<8>(gram, n, row + i, step + i, c);
  if (i + 4 <= rows) {
    pass<4>(gram, n, row + i, step + i, c);
    i += 4;
  }
  for (; i < rows; ++i) pass<1>(gram, n, row + i, step + i, c);

  const __m512i positive = _mm512_set1_epi32(0x7fffffff);
  __m512i best = _mm512_setzero_si512();
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 valid = first(n - j);
    const __m512 score = _mm512_mul_ps(_mm512_maskz_loadu_ps(valid, c + j),
                                       _mm512_maskz_loadu_ps(valid, weight + j));
    best = _mm512_max_epi32(best, _mm512_and_si512(_mm512_castps_si512(score), positive));
  }
  return _mm512_reduce_max_epi32(best);
}

}  // namespace csfast::avx512
