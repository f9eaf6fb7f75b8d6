// Execute with AVX-512: one neuron at a time, its three rows read once.
//
// Reads 3 * d elements a neuron and does four operations on each pair: bound by memory, and as the
// rows of a support lie apart, by how early each is asked for.
#include "csfast/execute.h"

#include <immintrin.h>

#include <algorithm>

#include "avx512/silu.h"
#include "loops.h"

namespace csfast::avx512 {
namespace {

// Neurons that rows are asked for in advance. One core, d = 2048, bfloat16, one neuron in ten: 0,
// 1, 2 give 12, 19, 17 GB/s (AMD EPYC, 2026-11-24); asking for the second-level cache only is no
// better.
constexpr int64_t kAhead = 1;

// Each type reads 64 bytes at a time; `mask` has a bit for every element that is there.

struct F32 {
  using Mask = __mmask16;
  static constexpr int64_t kSize = 4;
  static __m512 dot(__m512 sum, const char* w, const char* x, Mask mask) {
    return _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, w), _mm512_maskz_loadu_ps(mask, x), sum);
  }
  static void add(float* sum, __m512 a, const char* w, Mask mask) {
    const __m512 added =
        _mm512_fmadd_ps(a, _mm512_maskz_loadu_ps(mask, w), _mm512_maskz_loadu_ps(mask, sum));
    _mm512_mask_storeu_ps(sum, mask, added);
  }
  static void store(char* out, __m512 v, __mmask16 mask) { _mm512_mask_storeu_ps(out, mask, v); }
};

// What F16 and BF16 have in common: two floats come out of a word.
template <typename T>
struct Word {
  using Mask = __mmask32;
  static constexpr int64_t kSize = 2;
  static void add(float* sum, __m512 a, const char* w, Mask mask) {
    const __m512i words = _mm512_maskz_loadu_epi16(mask, w);
    const __mmask16 first = static_cast<__mmask16>(mask);
    const __mmask16 second = static_cast<__mmask16>(mask >> 16);
    const __m512 lower = T::widen(_mm512_castsi512_si256(words));
    const __m512 upper = T::widen(_mm512_extracti64x4_epi64(words, 1));
    _mm512_mask_storeu_ps(sum, first, _mm512_fmadd_ps(a, lower, _mm512_maskz_loadu_ps(first, sum)));
    _mm512_mask_storeu_ps(sum + 16, second,
                          _mm512_fmadd_ps(a, upper, _mm512_maskz_loadu_ps(second, sum + 16)));
  }
};

struct F16 : Word<F16> {
  static __m512 widen(__m256i v) { return _mm512_cvtph_ps(v); }
  static __m512 dot(__m512 sum, const char* w, const char* x, Mask mask) {
    const __m512i ws = _mm512_maskz_loadu_epi16(mask, w);
    const __m512i xs = _mm512_maskz_loadu_epi16(mask, x);
    sum =
        _mm512_fmadd_ps(widen(_mm512_castsi512_si256(ws)), widen(_mm512_castsi512_si256(xs)), sum);
    return _mm512_fmadd_ps(widen(_mm512_extracti64x4_epi64(ws, 1)),
                           widen(_mm512_extracti64x4_epi64(xs, 1)), sum);
  }
  static void store(char* out, __m512 v, __mmask16 mask) {
    _mm256_mask_storeu_epi16(out, mask,
                             _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

struct BF16 : Word<BF16> {
  static __m512 widen(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static __m512 dot(__m512 sum, const char* w, const char* x, Mask mask) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(mask, w),
                            (__m512bh)_mm512_maskz_loadu_epi16(mask, x));
  }
  static void store(char* out, __m512 v, __mmask16 mask) {
    _mm256_mask_storeu_epi16(out, mask, (__m256i)_mm512_cvtneps_pbh(v));
  }
};

template <typename T>
constexpr typename T::Mask mask_of(int64_t n) {
  return static_cast<typename T::Mask>((uint64_t{1} << n) - 1);
}

// Calls f(offset in elements, mask) for every 64 bytes of a row.
template <typename T, typename F>
inline void for_lines(int64_t d, F&& f) {
  constexpr int64_t kStep = 64 / T::kSize;
  int64_t c = 0;
  for (; c + kStep <= d; c += kStep) f(c, mask_of<T>(kStep));
  if (c < d) f(c, mask_of<T>(d - c));
}

template <typename T>
void gather_rows(const ExecuteParams& p, const char* x, const int32_t* neuron, int64_t n,
                 float* sum) {
  const char* gates = static_cast<const char*>(p.gate);
  const char* ups = static_cast<const char*>(p.up);
  const char* downs = static_cast<const char*>(p.down_t);
  const int64_t row = p.d * T::kSize;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t now = neuron[i] * row;
    const int64_t next = neuron[std::min(i + kAhead, n - 1)] * row;

    __m512 g = _mm512_setzero_ps();
    __m512 u = _mm512_setzero_ps();
    for_lines<T>(p.d, [&](int64_t c, typename T::Mask mask) {
      const int64_t at = c * T::kSize;
      _mm_prefetch(gates + next + at, _MM_HINT_T0);
      _mm_prefetch(ups + next + at, _MM_HINT_T0);
      g = T::dot(g, gates + now + at, x + at, mask);
      u = T::dot(u, ups + now + at, x + at, mask);
    });
    const __m512 a = _mm512_mul_ps(silu(_mm512_set1_ps(_mm512_reduce_add_ps(g))),
                                   _mm512_set1_ps(_mm512_reduce_add_ps(u)));

    for_lines<T>(p.d, [&](int64_t c, typename T::Mask mask) {
      const int64_t at = c * T::kSize;
      _mm_prefetch(downs + next + at, _MM_HINT_T0);
      T::add(sum + c, a, downs + now + at, mask);
    });
  }
}

template <typename T>
void finish_row(const float* sums, int64_t n_segments, int64_t d, char* out) {
  for (int64_t c = 0; c < d; c += 16) {
    const __mmask16 mask = mask_of<F32>(std::min<int64_t>(d - c, 16));
    __m512 total = _mm512_setzero_ps();
    for (int64_t s = 0; s < n_segments; ++s) {
      total = _mm512_add_ps(total, _mm512_maskz_loadu_ps(mask, sums + s * d + c));
    }
    T::store(out + c * T::kSize, total, mask);
  }
}

template <typename F>
void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f.template operator()<F32>();
    case DType::kF16:
      return f.template operator()<F16>();
    case DType::kBF16:
      return f.template operator()<BF16>();
  }
}

}  // namespace

void gather(const ExecuteParams& p, const void* x, const int32_t* neuron, int64_t n, bool first,
            float* sum) noexcept {
  if (first) std::fill(sum, sum + p.d, 0.0f);
  dispatch(p.dtype,
           [&]<typename T>() { gather_rows<T>(p, static_cast<const char*>(x), neuron, n, sum); });
}

void finish(const float* sums, int64_t n_segments, int64_t d, DType dtype, void* out) noexcept {
  dispatch(dtype,
           [&]<typename T>() { finish_row<T>(sums, n_segments, d, static_cast<char*>(out)); });
}

}  // namespace csfast::avx512
