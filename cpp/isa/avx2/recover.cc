// Recover eight neurons at a time.
#include "csfast/recover.h"

#include <immintrin.h>

#include <algorithm>

#include "isa/avx2/activation.h"
#include "isa/avx2/number.h"
#include "loops.h"

namespace csfast::avx2 {
namespace {

// Eight values from entry `at` on, of which `n` are there.
template <bool kFloat>
inline __m256 values(const Measured& m, int64_t at, int64_t n) {
  const auto from = [at](const void* array) { return static_cast<const char*>(array) + 4 * at; };
  __m256 y = load<F32>(from(m.y), n);
  if constexpr (!kFloat) y = _mm256_cvtepi32_ps(_mm256_castps_si256(y));
  const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(m.scale), load<F32>(from(m.row_scale), n));
  const __m256 v = _mm256_mul_ps(scale, y);
  return m.offset == nullptr ? v : _mm256_add_ps(v, load<F32>(from(m.offset), n));
}

template <bool kFloat>
void usage_of(const Measured& m, int64_t n, float* usage) {
  for (int64_t i = 0; i < n; i += 8) {
    const int64_t rest = std::min<int64_t>(n - i, 8);
    __m256 used;
    if (m.columns == 1) {
      used = values<kFloat>(m, i, rest);
    } else {
      __m256 v[2];  // gate and up of four neurons each
      for (int h = 0; h < 2; ++h) {
        v[h] = values<kFloat>(m, 2 * i + 8 * h, std::clamp<int64_t>(2 * rest - 8 * h, 0, 8));
      }
      const __m256 gates = _mm256_shuffle_ps(v[0], v[1], _MM_SHUFFLE(2, 0, 2, 0));
      const __m256 ups = _mm256_shuffle_ps(v[0], v[1], _MM_SHUFFLE(3, 1, 3, 1));
      const __m256 product = _mm256_mul_ps(activate(m.activation, gates), ups);
      // Neurons 0 1 4 5 2 3 6 7 into their order.
      used = _mm256_castpd_ps(
          _mm256_permute4x64_pd(_mm256_castps_pd(product), _MM_SHUFFLE(3, 1, 2, 0)));
    }
    used = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), used);
    store<F32>(reinterpret_cast<char*>(usage + i), used, rest);
  }
}

}  // namespace

void usage(const Measured& m, int64_t n, float* usage) noexcept {
  m.is_float ? usage_of<true>(m, n, usage) : usage_of<false>(m, n, usage);
}

Kept keep(const float* usage, int64_t n, float threshold) noexcept {
  Kept kept{0, 0.0f};
  __m256 missed = _mm256_setzero_ps();
  for (int64_t i = 0; i < n; i += 8) {
    const int64_t rest = std::min<int64_t>(n - i, 8);
    const __m256 used = load<F32>(reinterpret_cast<const char*>(usage + i), rest);
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
