// Execute with AVX-512: a few neurons at a time, their rows read once.
//
// Reads 3 * d elements a neuron and does four operations on each pair: bound by memory, and as the
// rows of a support lie apart, by how early and how many at a time are asked for.
#include "csfast/execute.h"

#include <immintrin.h>

#include <algorithm>

#include "avx512/activation.h"
#include "avx512/number.h"
#include "loops.h"

namespace csfast::avx512 {
namespace {

// Neurons that one row of the batch goes through together, while as many that follow are asked for,
// into the second-level cache: the first has too few places for lines that are on their way. One
// core, d = 2048, bfloat16, a quarter of the neurons one by one and in blocks of 16: 1, 2 and 4
// together read .65, .72, .80 and .84, .85, .86 of what plain reading does, 8 no more; one at a
// time into the first-level cache .40 and .58 (AMD EPYC, 2026-11-25).
constexpr int kTogether = 4;

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

// Where the rows of a neuron are, and how far it is from them to those that are asked for.
struct Neuron {
  const char* gate;
  const char* up;
  const char* down;
  int64_t ahead;
  int64_t index;
};

// Neurons whose products with kRows rows are summed at once: at most 16 sums, half of the
// registers.
template <int kRows>
constexpr int kDots = std::min(8 / kRows, kTogether);

// a[r][i] = the activation of neuron i for row r of x.
template <typename T, int kNeurons, int kRows>
inline void activate_neurons(const ExecuteParams& p, const Neuron* of, const char* x,
                             __m512 (*a)[kNeurons]) {
  const int64_t row = p.d * T::kSize;
  __m512 g[kRows][kNeurons] = {};
  __m512 u[kRows][kNeurons] = {};
  for_lines<T>(p.d, [&](int64_t c, typename T::Mask mask) {
    const int64_t at = c * T::kSize;
#pragma GCC unroll 4
    for (int i = 0; i < kNeurons; ++i) {
      _mm_prefetch(of[i].gate + of[i].ahead + at, _MM_HINT_T1);
      _mm_prefetch(of[i].up + of[i].ahead + at, _MM_HINT_T1);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        g[r][i] = T::dot(g[r][i], of[i].gate + at, x + r * row + at, mask);
        u[r][i] = T::dot(u[r][i], of[i].up + at, x + r * row + at, mask);
      }
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kNeurons; ++i) {
      const __m512 gated = _mm512_set1_ps(_mm512_reduce_add_ps(g[r][i]));
      const __m512 upped = _mm512_set1_ps(_mm512_reduce_add_ps(u[r][i]));
      a[r][i] = _mm512_mul_ps(activate(p.activation, add_bias<T>(gated, p.gate_bias, of[i].index)),
                              add_bias<T>(upped, p.up_bias, of[i].index));
    }
  }
}

// What kNeurons neurons add to kRows rows of the batch. A neuron's sums, and the order in which
// neurons add to a row, are the same for every number of either.
template <typename T, int kNeurons, int kRows>
inline void add_neurons(const ExecuteParams& p, const Neuron* of, const char* x, float* sum,
                        int64_t sum_stride) {
  __m512 a[kRows][kNeurons];
  constexpr int kStep = std::min(kDots<kRows>, kNeurons);
#pragma GCC unroll 4
  for (int i = 0; i < kNeurons; i += kStep) {
    __m512 some[kRows][kStep];
    activate_neurons<T, kStep, kRows>(p, of + i, x, some);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) std::copy(some[r], some[r] + kStep, a[r] + i);
  }
  for_lines<T>(p.d, [&](int64_t c, typename T::Mask mask) {
    const int64_t at = c * T::kSize;
    typename T::Line w[kNeurons];
#pragma GCC unroll 4
    for (int i = 0; i < kNeurons; ++i) {
      _mm_prefetch(of[i].down + of[i].ahead + at, _MM_HINT_T1);
      w[i] = T::load(of[i].down + at, mask);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      T::template add<kNeurons>(sum + r * sum_stride + c, a[r], w, mask);
    }
  });
}

// The same for all rows, while the neurons `next` are asked for.
template <typename T, int kNeurons>
void add_to_rows(const ExecuteParams& p, const Rows& rows, const int32_t* now,
                 const int32_t* next) {
  const int64_t row = p.d * T::kSize;
  Neuron of[kNeurons];
  for (int i = 0; i < kNeurons; ++i) {
    of[i] = {.gate = static_cast<const char*>(p.gate) + now[i] * row,
             .up = static_cast<const char*>(p.up) + now[i] * row,
             .down = static_cast<const char*>(p.down_t) + now[i] * row,
             .ahead = (int64_t{next[i]} - now[i]) * row,
             .index = now[i]};
  }
  int64_t r = 0;
  const auto add = [&]<int kRows>() {
    for (; r + kRows <= rows.n; r += kRows) {
      add_neurons<T, kNeurons, kRows>(p, of, static_cast<const char*>(rows.x) + r * row,
                                      rows.sum + r * rows.sum_stride, rows.sum_stride);
    }
  };
  add.template operator()<4>();
  add.template operator()<2>();
  add.template operator()<1>();
}

template <typename T>
void gather_rows(const ExecuteParams& p, const Rows& rows, const int32_t* neuron, int64_t n) {
  int64_t i = 0;
  for (; i + kTogether <= n; i += kTogether) {
    int32_t next[kTogether];
    for (int k = 0; k < kTogether; ++k) next[k] = neuron[std::min(i + kTogether + k, n - 1)];
    add_to_rows<T, kTogether>(p, rows, neuron + i, next);
  }
  for (; i < n; ++i) add_to_rows<T, 1>(p, rows, neuron + i, neuron + std::min(i + 1, n - 1));
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
