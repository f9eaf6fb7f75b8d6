#include "csfast/omp.h"

#include <algorithm>
#include <bit>

#include "loops.h"

namespace csfast::base {

// Four rows of gram at a time: correlations are then loaded and stored a quarter as often.
int32_t subtract(const float* gram, int64_t n, const int32_t* row, const float* step, int64_t rows,
                 const float* weight, float* c) noexcept {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    const float* r0 = gram + row[i] * n;
    const float* r1 = gram + row[i + 1] * n;
    const float* r2 = gram + row[i + 2] * n;
    const float* r3 = gram + row[i + 3] * n;
    const float s0 = step[i], s1 = step[i + 1], s2 = step[i + 2], s3 = step[i + 3];
    for (int64_t j = 0; j < n; ++j) {
      c[j] -= (s0 * r0[j] + s1 * r1[j]) + (s2 * r2[j] + s3 * r3[j]);
    }
  }
  for (; i < rows; ++i) {
    const float* r = gram + row[i] * n;
    for (int64_t j = 0; j < n; ++j) c[j] -= step[i] * r[j];
  }
  int32_t best = 0;
  for (int64_t j = 0; j < n; ++j) {
    best = std::max(best, std::bit_cast<int32_t>(c[j] * weight[j]) & 0x7fffffff);
  }
  return best;
}

}  // namespace csfast::base
