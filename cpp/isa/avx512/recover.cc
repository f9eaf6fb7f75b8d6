// Recover sixteen neurons at a time.
#include "csfast/recover.h"

#include <immintrin.h>

#include <algorithm>

#include "isa/avx512/activation.h"
#include "loops.h"

namespace csfast::avx512 {
namespace {

// Sixteen values from entry `at` on, of which those of `mask` are there.
template <bool kFloat>
inline __m512 values(const Measured& m, int64_t at, __mmask16 mask) {
  __m512 y;
  if constexpr (kFloat) {
    y = _mm512_maskz_loadu_ps(mask, static_cast<const float*>(m.y) + at);
  } else {
    y = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(mask, static_cast<const int32_t*>(m.y) + at));
  }
  const __m512 scale =
      _mm512_mul_ps(_mm512_set1_ps(m.scale), _mm512_maskz_loadu_ps(mask, m.row_scale + at));
  const __m512 v = _mm512_mul_ps(scale, y);
  if (m.offset == nullptr) return v;
  return _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, m.offset + at));
}

template <bool kFloat>
void usage_of(const Measured& m, int64_t n, float* usage) {
  const __m512i gates =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i ups = _mm512_add_epi32(gates, _mm512_set1_epi32(1));
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t rest = std::min<int64_t>(n - i, 16);
    const __mmask16 valid = static_cast<__mmask16>((1u << rest) - 1);
    __m512 used;
    if (m.columns == 1) {
      used = values<kFloat>(m, i, valid);
    } else {
      const uint32_t words = static_cast<uint32_t>((uint64_t{1} << (2 * rest)) - 1);
      const __m512 v[2] = {values<kFloat>(m, 2 * i, static_cast<__mmask16>(words)),
                           values<kFloat>(m, 2 * i + 16, static_cast<__mmask16>(words >> 16))};
      used = _mm512_mul_ps(activate(m.activation, _mm512_permutex2var_ps(v[0], gates, v[1])),
                           _mm512_permutex2var_ps(v[0], ups, v[1]));
    }
    _mm512_mask_storeu_ps(usage + i, valid, _mm512_abs_ps(used));
  }
}

}  // namespace

void usage(const Measured& m, int64_t n, float* usage) noexcept {
  m.is_float ? usage_of<true>(m, n, usage) : usage_of<false>(m, n, usage);
}

Kept keep(const float* usage, int64_t n, float threshold) noexcept {
  Kept kept{0, 0.0f};
  __m512 missed = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t rest = std::min<int64_t>(n - i, 16);
    const __mmask16 valid = static_cast<__mmask16>((1u << rest) - 1);
    const __m512 used = _mm512_maskz_loadu_ps(valid, usage + i);
    const __mmask16 below =
        _mm512_mask_cmp_ps_mask(valid, used, _mm512_set1_ps(threshold), _CMP_LT_OQ);
    missed = _mm512_mask_add_ps(missed, below, missed, _mm512_mul_ps(used, used));
    kept.mask |= static_cast<uint64_t>(valid & ~below) << i;
  }
  kept.missed = _mm512_reduce_add_ps(missed);
  return kept;
}

}  // namespace csfast::avx512
