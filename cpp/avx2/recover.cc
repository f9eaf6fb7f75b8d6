// Recover eight neurons at a time.
#include "csfast/recover.h"

#include <immintrin.h>

#include <algorithm>

#include "avx2/number.h"
#include "avx2/silu.h"
#include "loops.h"

namespace csfast::avx2 {

Kept keep(const int32_t* y, float scale, const float* row_scale, int64_t n, float threshold,
          float* usage) noexcept {
  const __m256 s = _mm256_set1_ps(scale);
  Kept kept{0, 0.0f};
  __m256 missed = _mm256_setzero_ps();
  for (int64_t i = 0; i < n; i += 8) {
    const int64_t rest = std::min<int64_t>(n - i, 8);
    __m256 z[2];  // gate and up of four neurons each
    for (int h = 0; h < 2; ++h) {
      const int64_t at = 2 * i + 8 * h;
      const int64_t words = std::clamp<int64_t>(2 * rest - 8 * h, 0, 8);
      const __m256 scales = load<F32>(reinterpret_cast<const char*>(row_scale + at), words);
      const __m256 sums = load<F32>(reinterpret_cast<const char*>(y + at), words);
      z[h] = _mm256_mul_ps(_mm256_mul_ps(s, scales), _mm256_cvtepi32_ps(_mm256_castps_si256(sums)));
    }
    const __m256 gates = _mm256_shuffle_ps(z[0], z[1], _MM_SHUFFLE(2, 0, 2, 0));
    const __m256 ups = _mm256_shuffle_ps(z[0], z[1], _MM_SHUFFLE(3, 1, 3, 1));
    const __m256 product = _mm256_mul_ps(silu(gates), ups);
    // Neurons 0 1 4 5 2 3 6 7 into their order.
    const __m256 ordered =
        _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(product), _MM_SHUFFLE(3, 1, 2, 0)));
    const __m256 used = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), ordered);
    store<F32>(reinterpret_cast<char*>(usage + i), used, rest);

    const __m256i valid = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(rest)),
                                             _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const __m256 below = _mm256_and_ps(_mm256_castsi256_ps(valid),
                                       _mm256_cmp_ps(used, _mm256_set1_ps(threshold), _CMP_LT_OQ));
    missed = _mm256_add_ps(missed, _mm256_and_ps(below, _mm256_mul_ps(used, used)));
    const int stays = _mm256_movemask_ps(_mm256_andnot_ps(below, _mm256_castsi256_ps(valid)));
    kept.mask |= static_cast<uint64_t>(stays) << i;
  }
  kept.missed = sum_of(missed);
  return kept;
}

}  // namespace csfast::avx2
