// Project with AVX2: one row of phi at a time, against up to four activations.
//
// Reads phi once for four rows of the batch and does two operations on each pair of elements: bound
// by memory.
#include "csfast/project.h"

#include <immintrin.h>

#include "isa/avx2/number.h"
#include "loops.h"

namespace csfast::avx2 {
namespace {

constexpr int64_t kAhead =
    4096;  // bytes: one page, at whose end the processor's own prefetch stops

template <typename T, int kRows>
void project_row(const char* phi, const char* x, int64_t d, float* y, int64_t y_stride) {
  constexpr int64_t kLine = 64 / T::kSize;
  __m256 sum[kRows][2] = {};  // two chains of additions each, to wait less for either
  const auto add = [&](int64_t c, int64_t size, int chain) {
    const __m256 w = load<T>(phi + c * T::kSize, size);
#pragma GCC unroll 4
    for (int b = 0; b < kRows; ++b) {
      const __m256 v = load<T>(x + (b * d + c) * T::kSize, size);
      sum[b][chain] = _mm256_fmadd_ps(w, v, sum[b][chain]);
    }
  };
  int64_t c = 0;
  for (; c + kLine <= d; c += kLine) {
    _mm_prefetch(phi + c * T::kSize + kAhead, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int64_t e = 0; e < kLine; e += 8) add(c + e, 8, e / 8 % 2);
  }
  for (; c < d; c += 8) add(c, d - c, 0);
#pragma GCC unroll 4
  for (int b = 0; b < kRows; ++b) {
    y[b * y_stride] = sum_of(_mm256_add_ps(sum[b][0], sum[b][1]));
  }
}

}  // namespace

void project(const ProjectParams& p, int64_t first, int64_t n) noexcept {
  dispatch(p.dtype, [&]<typename T>() {
    const int64_t row = p.d * T::kSize;
    for (int64_t i = first; i < first + n; ++i) {
      const char* phi = static_cast<const char*>(p.phi) + i * row;
      int64_t b = 0;
      const auto run = [&]<int kRows>() {
        for (; b + kRows <= p.batch; b += kRows) {
          project_row<T, kRows>(phi, static_cast<const char*>(p.x) + b * row, p.d,
                                p.y + b * p.rows + i, p.rows);
        }
      };
      run.template operator()<4>();
      run.template operator()<1>();
    }
  });
}

}  // namespace csfast::avx2
