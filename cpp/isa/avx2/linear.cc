// Linear with AVX2: four rows of w by one of the batch, two by two; bfloat16 becomes float32.
#include "csfast/linear.h"

#include <immintrin.h>

#include <cstring>

#include "isa/base/number.h"
#include "loops.h"

namespace csfast::avx2 {
namespace {

struct Sum {
  __m256 low, high;  // eight lanes each
};

constexpr int kBatchMost = 2;
constexpr int rows_of(int batch) {
  return batch == 1 ? 4 : 2;  // eight registers of sums, and eight for the rest
}

void prefetch(const char* p) {
  _mm_prefetch(p, _MM_HINT_T0);
}

float sum_of(const Sum& sum) {
  const __m256 v = _mm256_add_ps(sum.low, sum.high);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

template <int kRows>
void sums_of(const Sum (&sum)[kRows], float* total) {
  for (int i = 0; i < kRows; ++i) total[i] = sum_of(sum[i]);
}

__m256 at(const char* x, int lanes) {
  return _mm256_loadu_ps(reinterpret_cast<const float*>(x) + lanes);
}

struct F32 {
  struct Weights {
    __m256 low, high;
  };
  static constexpr int64_t kSize = 4, kInput = 4, kChannels = 16;
  static Weights load(const char* w) { return {at(w, 0), at(w, 8)}; }
  static Weights load(const char* w, int n) {
    char part[64] = {};
    std::memcpy(part, w, n * kSize);
    return load(part);
  }
  static Sum add(const Sum& sum, const Weights& w, const char* x) {
    return {_mm256_fmadd_ps(w.low, at(x, 0), sum.low), _mm256_fmadd_ps(w.high, at(x, 8), sum.high)};
  }
  static float value(const void* p, int64_t i) { return static_cast<const float*>(p)[i]; }
};

struct BF16 {
  struct Weights {
    __m256 odd[2], even[2];
  };
  static constexpr int64_t kSize = 2, kInput = 4, kChannels = 32;
  static Weights load(const char* w) {
    Weights found;
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + i);
      const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
      found.odd[i] = _mm256_castsi256_ps(_mm256_and_si256(pairs, upper));
      found.even[i] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    }
    return found;
  }
  static Weights load(const char* w, int n) {
    char part[64] = {};
    std::memcpy(part, w, n * kSize);
    return load(part);
  }
  // The odd channels lie before the even ones, as `place` puts them.
  static Sum add(const Sum& sum, const Weights& w, const char* x) {
    const __m256 low = _mm256_fmadd_ps(w.odd[0], at(x, 0), sum.low);
    const __m256 high = _mm256_fmadd_ps(w.odd[1], at(x, 8), sum.high);
    return {_mm256_fmadd_ps(w.even[0], at(x, 16), low),
            _mm256_fmadd_ps(w.even[1], at(x, 24), high)};
  }
  static float value(const void* p, int64_t i) {
    return base::to_float(static_cast<const base::BFloat16*>(p)[i]);
  }
};

// 32 channels from c on, rounded, the odd ones first.
void place(const float* x, float* work, int64_t c) {
  for (int i = 0; i < 16; ++i) {
    work[c + i] = base::to_float(base::from_float<base::BFloat16>(x[2 * i + 1]));
    work[c + 16 + i] = base::to_float(base::from_float<base::BFloat16>(x[2 * i]));
  }
}

}  // namespace

#include "isa/linear.inc"

}  // namespace csfast::avx2
