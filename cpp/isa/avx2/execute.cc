// Execute with AVX2: a few neurons at a time, their rows read once.
//
// Reads 3 * d elements a neuron and does four operations on each pair: bound by memory, and as the
// rows of a support lie apart, by how early and how many at a time are asked for.
#include "csfast/execute.h"

#include <immintrin.h>

#include <algorithm>

#include "isa/avx2/activation.h"
#include "isa/avx2/number.h"
#include "loops.h"

namespace csfast::avx2 {
namespace {

// Neurons that one row of the batch goes through together, while as many that follow are asked for,
// into the second-level cache: the first has too few places for lines that are on their way. One
// core, d = 2048, bfloat16, a quarter of the neurons one by one and in blocks of 16: 1, 2 and 4
// together read .66, .66, .73 and .89, .76, .83 of what plain reading does; one at a time into the
// first-level cache .39 and .66 (AMD EPYC, 2026-11-25).
constexpr int kTogether = 4;

// Calls f(c, n) for every cache line of a row: its first element and how many it has.
template <typename T, typename F>
inline void for_lines(int64_t d, F&& f) {
  constexpr int64_t kStep = 64 / T::kSize;
  int64_t c = 0;
  for (; c + kStep <= d; c += kStep) f(c, kStep);
  if (c < d) f(c, d - c);
}

// z + entry j of bias, unless that is null; both in every lane.
template <typename T>
inline __m256 add_bias(__m256 z, const void* bias, int64_t j) {
  if (bias == nullptr) return z;
  const __m256 v = load<T>(static_cast<const char*>(bias) + j * T::kSize, 1);
  return _mm256_add_ps(z, _mm256_broadcastss_ps(_mm256_castps256_ps128(v)));
}

// Where the rows of a neuron are, and how far it is from them to those that are asked for.
struct Neuron {
  const char* gate;
  const char* up;
  const char* down;
  int64_t ahead;
  int64_t index;
};

// Neurons whose products with kRows rows are summed at once: with one row as many as are together,
// though not all of the 16 sums fit into registers; with two, 8 sums.
template <int kRows>
constexpr int kDots = kRows == 1 ? kTogether : 1;

// a[r][i] = the activation of neuron i for row r of x.
template <typename T, int kNeurons, int kRows>
inline void activate_neurons(const ExecuteParams& p, const Neuron* of, const char* x,
                             __m256 (*a)[kNeurons]) {
  const int64_t row = p.form.d * T::kSize;
  __m256 g[kRows][kNeurons][2] = {};  // two chains of additions each, to wait less for either
  __m256 u[kRows][kNeurons][2] = {};
  for_lines<T>(p.form.d, [&](int64_t c, int64_t size) {
#pragma GCC unroll 4
    for (int i = 0; i < kNeurons; ++i) {
      _mm_prefetch(of[i].gate + of[i].ahead + c * T::kSize, _MM_HINT_T1);
      _mm_prefetch(of[i].up + of[i].ahead + c * T::kSize, _MM_HINT_T1);
    }
#pragma GCC unroll 4
    for (int64_t e = 0; e < size; e += 8) {
      const int64_t at = (c + e) * T::kSize;
      const int chain = e / 8 % 2;
#pragma GCC unroll 4
      for (int i = 0; i < kNeurons; ++i) {
        const __m256 gs = load<T>(of[i].gate + at, size - e);
        const __m256 us = load<T>(of[i].up + at, size - e);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m256 xs = load<T>(x + r * row + at, size - e);
          g[r][i][chain] = _mm256_fmadd_ps(gs, xs, g[r][i][chain]);
          u[r][i][chain] = _mm256_fmadd_ps(us, xs, u[r][i][chain]);
        }
      }
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kNeurons; ++i) {
      const __m256 gated = _mm256_set1_ps(sum_of(_mm256_add_ps(g[r][i][0], g[r][i][1])));
      const __m256 upped = _mm256_set1_ps(sum_of(_mm256_add_ps(u[r][i][0], u[r][i][1])));
      a[r][i] = _mm256_mul_ps(
          activate(p.form.activation, add_bias<T>(gated, p.weights.gate_bias, of[i].index)),
          add_bias<T>(upped, p.weights.up_bias, of[i].index));
    }
  }
}

// What kNeurons neurons add to kRows rows of the batch. A neuron's sums, and the order in which
// neurons add to a row, are the same for every number of either.
template <typename T, int kNeurons, int kRows>
inline void add_neurons(const ExecuteParams& p, const Neuron* of, const char* x, float* sum,
                        int64_t sum_stride) {
  __m256 a[kRows][kNeurons];
  constexpr int kStep = std::min(kDots<kRows>, kNeurons);
#pragma GCC unroll 4
  for (int i = 0; i < kNeurons; i += kStep) {
    __m256 some[kRows][kStep];
    activate_neurons<T, kStep, kRows>(p, of + i, x, some);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) std::copy(some[r], some[r] + kStep, a[r] + i);
  }
  for_lines<T>(p.form.d, [&](int64_t c, int64_t size) {
#pragma GCC unroll 4
    for (int i = 0; i < kNeurons; ++i) {
      _mm_prefetch(of[i].down + of[i].ahead + c * T::kSize, _MM_HINT_T1);
    }
#pragma GCC unroll 4
    for (int64_t e = 0; e < size; e += 8) {
      __m256 w[kNeurons];
#pragma GCC unroll 4
      for (int i = 0; i < kNeurons; ++i) {
        w[i] = load<T>(of[i].down + (c + e) * T::kSize, size - e);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        char* to = reinterpret_cast<char*>(sum + r * sum_stride + c + e);
        __m256 total = load<F32>(to, size - e);
#pragma GCC unroll 4
        for (int i = 0; i < kNeurons; ++i) total = _mm256_fmadd_ps(a[r][i], w[i], total);
        store<F32>(to, total, size - e);
      }
    }
  });
}

// The same for all rows, while the neurons `next` are asked for.
template <typename T, int kNeurons>
void add_to_rows(const ExecuteParams& p, const Rows& rows, const int32_t* now,
                 const int32_t* next) {
  const int64_t row = p.form.d * T::kSize;
  Neuron of[kNeurons];
  for (int i = 0; i < kNeurons; ++i) {
    of[i] = {.gate = static_cast<const char*>(p.weights.gate) + now[i] * row,
             .up = static_cast<const char*>(p.weights.up) + now[i] * row,
             .down = static_cast<const char*>(p.weights.down_t) + now[i] * row,
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
  add.template operator()<2>();
  add.template operator()<1>();
}

template <typename T>
void gather_rows(const ExecuteParams& p, const Rows& rows, const int32_t* neuron, int64_t n,
                 int64_t n_ahead) {
  const int64_t last = n + n_ahead - 1;
  int64_t i = 0;
  for (; i + kTogether <= n; i += kTogether) {
    int32_t next[kTogether];
    for (int k = 0; k < kTogether; ++k) next[k] = neuron[std::min(i + kTogether + k, last)];
    add_to_rows<T, kTogether>(p, rows, neuron + i, next);
  }
  for (; i < n; ++i) add_to_rows<T, 1>(p, rows, neuron + i, neuron + std::min(i + 1, last));
}

template <typename T>
void finish_row(const float* sums, int64_t n_segments, int64_t d, const char* bias, char* out) {
  for (int64_t c = 0; c < d; c += 8) {
    __m256 total = _mm256_setzero_ps();
    for (int64_t s = 0; s < n_segments; ++s) {
      const char* from = reinterpret_cast<const char*>(sums + s * d + c);
      total = _mm256_add_ps(total, load<F32>(from, d - c));
    }
    if (bias != nullptr) total = _mm256_add_ps(total, load<T>(bias + c * T::kSize, d - c));
    store<T>(out + c * T::kSize, total, d - c);
  }
}

}  // namespace

void gather(const ExecuteParams& p, const Rows& rows, const int32_t* neuron, int64_t n,
            int64_t n_ahead, bool first) noexcept {
  for (int64_t r = 0; first && r < rows.n; ++r) {
    std::fill_n(rows.sum + r * rows.sum_stride, p.form.d, 0.0f);
  }
  dispatch(p.form.dtype, [&]<typename T>() { gather_rows<T>(p, rows, neuron, n, n_ahead); });
}

void finish(const float* sums, int64_t n_segments, int64_t d, DType dtype, const void* bias,
            void* out) noexcept {
  dispatch(dtype, [&]<typename T>() {
    finish_row<T>(sums, n_segments, d, static_cast<const char*>(bias), static_cast<char*>(out));
  });
}

}  // namespace csfast::avx2
