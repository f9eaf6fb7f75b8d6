// Linear with AVX-512: four rows of w by up to six of the batch, bfloat16 by its own dot product.
#include "csfast/linear.h"

#include <immintrin.h>

#include <cstring>

#include "isa/base/number.h"
#include "loops.h"

namespace csfast::avx512 {
namespace {

using Sum = __m512;

constexpr int kBatchMost = 6;  // of four rows: 24 registers of sums, and eight for the rest
constexpr int rows_of(int) {
  return 4;
}

void prefetch(const char* p) {
  _mm_prefetch(p, _MM_HINT_T0);
}

float sum_of(Sum sum) {
  return _mm512_reduce_add_ps(sum);  // halves, again and again
}

// Each in the same order; four of them together take half of the instructions.
void sums_of(const Sum (&sum)[1], float* total) {
  *total = sum_of(sum[0]);
}
void sums_of(const Sum (&sum)[4], float* total) {
  const auto half = [](Sum s) {
    return _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  };
  const auto quarters = [&](Sum s, Sum t) {  // lanes 0 to 3 of either, added up
    const __m256 a = half(s), b = half(t);
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  };
  const __m256d a = _mm256_castps_pd(quarters(sum[0], sum[1]));
  const __m256d b = _mm256_castps_pd(quarters(sum[2], sum[3]));
  const __m256 two = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
                                   _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  const __m256 one = _mm256_add_ps(two, _mm256_movehdup_ps(two));  // sums 0, 2; 1, 3
  const __m128 low = _mm256_castps256_ps128(one), high = _mm256_extractf128_ps(one, 1);
  _mm_storeu_ps(total, _mm_blend_ps(low, _mm_moveldup_ps(high), 0b1010));
}

struct F32 {
  static constexpr int64_t kSize = 4, kInput = 4, kChannels = 16;
  static __m512 load(const char* w) { return _mm512_loadu_ps(w); }
  static __m512 load(const char* w, int n) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), w);
  }
  static Sum add(Sum sum, __m512 w, const char* x) {
    return _mm512_fmadd_ps(w, _mm512_loadu_ps(x), sum);
  }
  static float value(const void* p, int64_t i) { return static_cast<const float*>(p)[i]; }
};

struct BF16 {
  static constexpr int64_t kSize = 2, kInput = 2, kChannels = 32;
  static __m512i load(const char* w) { return _mm512_loadu_si512(w); }
  static __m512i load(const char* w, int n) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), w);
  }
  static Sum add(Sum sum, __m512i w, const char* x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
  }
  static float value(const void* p, int64_t i) {
    return base::to_float(static_cast<const base::BFloat16*>(p)[i]);
  }
};

// 32 channels from c on, rounded, in their order.
void place(const float* x, float* work, int64_t c) {
  base::BFloat16* to = reinterpret_cast<base::BFloat16*>(work) + c;
  for (int i = 0; i < 32; ++i) to[i] = base::from_float<base::BFloat16>(x[i]);
}

}  // namespace

#include "isa/linear.inc"

}  // namespace csfast::avx512
