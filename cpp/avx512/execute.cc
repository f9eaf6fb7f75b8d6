// Execute with AVX-512: one neuron at a time, its three rows read once.
//
// Reads 3 * d elements a neuron and does four operations on each pair: bound by memory, and as the
// rows of a support lie apart, by how early each is asked for.
#include "csfast/execute.h"

#include <immintrin.h>

#include <algorithm>

#include "avx512/activation.h"
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
  using Line = __m512;  // 64 bytes as floats
  static constexpr int64_t kSize = 4;
  static Line load(const char* w, Mask mask) { return _mm512_maskz_loadu_ps(mask, w); }
  static __m512 first(Line w) { return w; }
  static __m512 dot(__m512 sum, const char* w, const char* x, Mask mask) {
    return _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, w), _mm512_maskz_loadu_ps(mask, x), sum);
  }
  static void add(float* sum, __m512 a, Line w, Mask mask) {
    _mm512_mask_storeu_ps(sum, mask, _mm512_fmadd_ps(a, w, _mm512_maskz_loadu_ps(mask, sum)));
  }
  static void store(char* out, __m512 v, __mmask16 mask) { _mm512_mask_storeu_ps(out, mask, v); }
};

// What F16 and BF16 have in common: two floats come out of a word.
struct Halves {
  __m512 lower, upper;
};
template <typename T>
struct Word {
  using Mask = __mmask32;
  using Line = Halves;  // 64 bytes as floats
  static constexpr int64_t kSize = 2;
  static Line load(const char* w, Mask mask) {
    const __m512i words = _mm512_maskz_loadu_epi16(mask, w);
    return {T::widen(_mm512_castsi512_si256(words)), T::widen(_mm512_extracti64x4_epi64(words, 1))};
  }
  static __m512 first(const Line& w) { return w.lower; }  // sixteen floats
  static void add(float* sum, __m512 a, const Line& w, Mask mask) {
    const __mmask16 first = static_cast<__mmask16>(mask);
    const __mmask16 second = static_cast<__mmask16>(mask >> 16);
    _mm512_mask_storeu_ps(sum, first,
                          _mm512_fmadd_ps(a, w.lower, _mm512_maskz_loadu_ps(first, sum)));
    _mm512_mask_storeu_ps(sum + 16, second,
                          _mm512_fmadd_ps(a, w.upper, _mm512_maskz_loadu_ps(second, sum + 16)));
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

// z + entry j of bias, unless that is null; both in every lane.
template <typename T>
inline __m512 add_bias(__m512 z, const void* bias, int64_t j) {
  if (bias == nullptr) return z;
  const __m512 v = T::first(T::load(static_cast<const char*>(bias) + j * T::kSize, 1));
  return _mm512_add_ps(z, _mm512_broadcastss_ps(_mm512_castps512_ps128(v)));
}

// What neuron `now` adds to kRows rows of the batch, while the rows of neuron `next` are asked for.
template <typename T, int kRows>
inline void add_neuron(const ExecuteParams& p, int64_t now, int64_t next, const char* x, float* sum,
                       int64_t sum_stride) {
  const int64_t row = p.d * T::kSize;
  const char* gate = static_cast<const char*>(p.gate) + now * row;
  const char* up = static_cast<const char*>(p.up) + now * row;
  const char* down = static_cast<const char*>(p.down_t) + now * row;
  const int64_t ahead = (next - now) * row;

  __m512 g[kRows] = {};
  __m512 u[kRows] = {};
  for_lines<T>(p.d, [&](int64_t c, typename T::Mask mask) {
    const int64_t at = c * T::kSize;
    _mm_prefetch(gate + ahead + at, _MM_HINT_T0);
    _mm_prefetch(up + ahead + at, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      g[r] = T::dot(g[r], gate + at, x + r * row + at, mask);
      u[r] = T::dot(u[r], up + at, x + r * row + at, mask);
    }
  });
  __m512 a[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const __m512 gated = add_bias<T>(_mm512_set1_ps(_mm512_reduce_add_ps(g[r])), p.gate_bias, now);
    a[r] = _mm512_mul_ps(activate(p.activation, gated),
                         add_bias<T>(_mm512_set1_ps(_mm512_reduce_add_ps(u[r])), p.up_bias, now));
  }
  for_lines<T>(p.d, [&](int64_t c, typename T::Mask mask) {
    const int64_t at = c * T::kSize;
    _mm_prefetch(down + ahead + at, _MM_HINT_T0);
    const typename T::Line w = T::load(down + at, mask);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) T::add(sum + r * sum_stride + c, a[r], w, mask);
  });
}

template <typename T>
void gather_rows(const ExecuteParams& p, const Rows& rows, const int32_t* neuron, int64_t n) {
  const char* x = static_cast<const char*>(rows.x);
  const int64_t row = p.d * T::kSize;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t now = neuron[i];
    const int64_t next = neuron[std::min(i + kAhead, n - 1)];
    int64_t r = 0;
    for (; r + 4 <= rows.n; r += 4) {
      add_neuron<T, 4>(p, now, next, x + r * row, rows.sum + r * rows.sum_stride, rows.sum_stride);
    }
    for (; r < rows.n; ++r) {
      add_neuron<T, 1>(p, now, next, x + r * row, rows.sum + r * rows.sum_stride, rows.sum_stride);
    }
  }
}

template <typename T>
void finish_row(const float* sums, int64_t n_segments, int64_t d, const char* bias, char* out) {
  for (int64_t c = 0; c < d; c += 16) {
    const __mmask16 mask = mask_of<F32>(std::min<int64_t>(d - c, 16));
    __m512 total = _mm512_setzero_ps();
    for (int64_t s = 0; s < n_segments; ++s) {
      total = _mm512_add_ps(total, _mm512_maskz_loadu_ps(mask, sums + s * d + c));
    }
    if (bias != nullptr) {
      total = _mm512_add_ps(total, T::first(T::load(bias + c * T::kSize, mask)));
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

void gather(const ExecuteParams& p, const Rows& rows, const int32_t* neuron, int64_t n,
            bool first) noexcept {
  for (int64_t r = 0; first && r < rows.n; ++r) {
    std::fill_n(rows.sum + r * rows.sum_stride, p.d, 0.0f);
  }
  dispatch(p.dtype, [&]<typename T>() { gather_rows<T>(p, rows, neuron, n); });
}

void finish(const float* sums, int64_t n_segments, int64_t d, DType dtype, const void* bias,
            void* out) noexcept {
  dispatch(dtype, [&]<typename T>() {
    finish_row<T>(sums, n_segments, d, static_cast<const char*>(bias), static_cast<char*>(out));
  });
}

}  // namespace csfast::avx512
