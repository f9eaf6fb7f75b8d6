// Project with AVX-512: one row of phi at a time, against up to four activations; bfloat16 by its
// own dot product.
//
// Reads phi once for four rows of the batch, with three instructions a cache line for one of them:
// bound by memory.
#include "csfast/project.h"

#include <immintrin.h>

#include "isa/avx512/number.h"
#include "loops.h"

namespace csfast::avx512 {
namespace {

constexpr int64_t kAhead =
    4096;  // bytes: one page, at whose end the processor's own prefetch stops

template <typename T, int kRows>
void project_row(const char* phi, const char* x, int64_t d, float* y, int64_t y_stride) {
  constexpr int64_t kLine = 64 / T::kSize;
  __m512 sum[kRows][2] = {};  // two chains of additions each, to wait less for either
  const auto add = [&](int64_t c, typename T::Mask mask, int chain) {
    _mm_prefetch(phi + c * T::kSize + kAhead, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int b = 0; b < kRows; ++b) {
      const char* at = x + (b * d + c) * T::kSize;
      sum[b][chain] = T::dot(sum[b][chain], phi + c * T::kSize, at, mask);
    }
  };
  int64_t c = 0;
  for (; c + 2 * kLine <= d; c += 2 * kLine) {
    add(c, T::kAll, 0);
    add(c + kLine, T::kAll, 1);
  }
  if (c + kLine <= d) {
    add(c, T::kAll, 0);
    c += kLine;
  }
  if (c < d) add(c, static_cast<typename T::Mask>((uint64_t{1} << (d - c)) - 1), 1);
#pragma GCC unroll 4
  for (int b = 0; b < kRows; ++b) {
    y[b * y_stride] = _mm512_reduce_add_ps(_mm512_add_ps(sum[b][0], sum[b][1]));
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

}  // namespace csfast::avx512
