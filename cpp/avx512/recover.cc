// Recover sixteen neurons at a time.
#include "csfast/recover.h"

#include <immintrin.h>

#include <algorithm>

#include "avx512/silu.h"
#include "loops.h"

namespace csfast::avx512 {

Kept keep(const int32_t* y, float scale, const float* row_scale, int64_t n, float threshold,
          float* usage) noexcept {
  const __m512i gates =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i ups = _mm512_add_epi32(gates, _mm512_set1_epi32(1));
  const __m512 s = _mm512_set1_ps(scale);
  Kept kept{0, 0.0f};
  __m512 missed = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t rest = std::min<int64_t>(n - i, 16);
    const uint32_t words = static_cast<uint32_t>((uint64_t{1} << (2 * rest)) - 1);
    const __mmask16 first = static_cast<__mmask16>(words);
    const __mmask16 second = static_cast<__mmask16>(words >> 16);
    const __m512 scales[2] = {_mm512_maskz_loadu_ps(first, row_scale + 2 * i),
                              _mm512_maskz_loadu_ps(second, row_scale + 2 * i + 16)};
    const __m512 sums[2] = {_mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(first, y + 2 * i)),
                            _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(second, y + 2 * i + 16))};
    const auto value = [&](__m512i which) {
      return _mm512_mul_ps(_mm512_mul_ps(s, _mm512_permutex2var_ps(scales[0], which, scales[1])),
                           _mm512_permutex2var_ps(sums[0], which, sums[1]));
    };
    const __m512 used = _mm512_abs_ps(_mm512_mul_ps(silu(value(gates)), value(ups)));

    const __mmask16 valid = static_cast<__mmask16>((1u << rest) - 1);
    const __mmask16 below =
        _mm512_mask_cmp_ps_mask(valid, used, _mm512_set1_ps(threshold), _CMP_LT_OQ);
    _mm512_mask_storeu_ps(usage + i, valid, used);
    missed = _mm512_mask_add_ps(missed, below, missed, _mm512_mul_ps(used, used));
    kept.mask |= static_cast<uint64_t>(valid & ~below) << i;
  }
  kept.missed = _mm512_reduce_add_ps(missed);
  return kept;
}

}  // namespace csfast::avx512
