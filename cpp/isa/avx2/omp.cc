// Omp eight atoms at a time.
#include "csfast/omp.h"

#include <immintrin.h>

#include <algorithm>

#include "isa/avx2/number.h"
#include "loops.h"

namespace csfast::avx2 {
namespace {

__m256 at(const float* p, int64_t n) {
  return load<F32>(reinterpret_cast<const char*>(p), n);
}

// c -= step * rows, kRows of them: correlations are then loaded and stored that much less often.
template <int kRows>
void pass(const float* gram, int64_t n, const int32_t* row, const float* step, float* c) {
  const float* r[kRows];
  __m256 s[kRows];
  for (int k = 0; k < kRows; ++k) {
    r[k] = gram + row[k] * n;
    s[k] = _mm256_set1_ps(step[k]);
  }
  for (int64_t j = 0; j < n; j += 8) {
    __m256 sum = at(c + j, n - j);
    for (int k = 0; k < kRows; ++k) sum = _mm256_fnmadd_ps(s[k], at(r[k] + j, n - j), sum);
    store<F32>(reinterpret_cast<char*>(c + j), sum, n - j);
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

  const __m256i positive = _mm256_set1_epi32(0x7fffffff);
  __m256i best = _mm256_setzero_si256();
  for (int64_t j = 0; j < n; j += 8) {
    const __m256 score = _mm256_mul_ps(at(c + j, n - j), at(weight + j, n - j));
    best = _mm256_max_epi32(best, _mm256_and_si256(_mm256_castps_si256(score), positive));
  }
  alignas(32) int32_t part[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(part), best);
  return *std::max_element(part, part + 8);
}

}  // namespace csfast::avx2
