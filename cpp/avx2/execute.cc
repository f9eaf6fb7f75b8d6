// Execute with AVX2: one neuron at a time, its three rows read once.
//
// Reads 3 * d elements a neuron and does four operations on each pair: bound by memory, and as the
// rows of a support lie apart, by how early each is asked for.
#include "csfast/execute.h"

#include <immintrin.h>

#include <algorithm>

#include "avx2/activation.h"
#include "avx2/number.h"
#include "loops.h"

namespace csfast::avx2 {
namespace {

// Neurons that rows are asked for in advance. One core, d = 2048, bfloat16, one neuron in ten: 0,
// 1, 2 give 10, 20, 20 GB/s (AMD EPYC, 2026-11-24).
constexpr int64_t kAhead = 1;

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

// What neuron `now` adds to kRows rows of the batch, while the rows of neuron `next` are asked for.
template <typename T, int kRows>
inline void add_neuron(const ExecuteParams& p, int64_t now, int64_t next, const char* x, float* sum,
                       int64_t sum_stride) {
  const int64_t row = p.d * T::kSize;
  const char* gate = static_cast<const char*>(p.gate) + now * row;
  const char* up = static_cast<const char*>(p.up) + now * row;
  const char* down = static_cast<const char*>(p.down_t) + now * row;
  const int64_t ahead = (next - now) * row;

  __m256 g[kRows][2] = {};  // two chains of additions each, to wait less for either
  __m256 u[kRows][2] = {};
  for_lines<T>(p.d, [&](int64_t c, int64_t size) {
    _mm_prefetch(gate + ahead + c * T::kSize, _MM_HINT_T0);
    _mm_prefetch(up + ahead + c * T::kSize, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int64_t e = 0; e < size; e += 8) {
      const int64_t at = (c + e) * T::kSize;
      const int chain = e / 8 % 2;
      const __m256 gs = load<T>(gate + at, size - e);
      const __m256 us = load<T>(up + at, size - e);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        const __m256 xs = load<T>(x + r * row + at, size - e);
        g[r][chain] = _mm256_fmadd_ps(gs, xs, g[r][chain]);
        u[r][chain] = _mm256_fmadd_ps(us, xs, u[r][chain]);
      }
    }
  });
  __m256 a[kRows];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    const __m256 gated = _mm256_set1_ps(sum_of(_mm256_add_ps(g[r][0], g[r][1])));
    const __m256 upped = _mm256_set1_ps(sum_of(_mm256_add_ps(u[r][0], u[r][1])));
    a[r] = _mm256_mul_ps(activate(p.activation, add_bias<T>(gated, p.gate_bias, now)),
                         add_bias<T>(upped, p.up_bias, now));
  }
  for_lines<T>(p.d, [&](int64_t c, int64_t size) {
    _mm_prefetch(down + ahead + c * T::kSize, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int64_t e = 0; e < size; e += 8) {
      const __m256 w = load<T>(down + (c + e) * T::kSize, size - e);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        char* to = reinterpret_cast<char*>(sum + r * sum_stride + c + e);
        store<F32>(to, _mm256_fmadd_ps(a[r], w, load<F32>(to, size - e)), size - e);
      }
    }
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
    for (; r + 2 <= rows.n; r += 2) {
      add_neuron<T, 2>(p, now, next, x + r * row, rows.sum + r * rows.sum_stride, rows.sum_stride);
    }
    if (r < rows.n) {
      add_neuron<T, 1>(p, now, next, x + r * row, rows.sum + r * rows.sum_stride, rows.sum_stride);
    }
  }
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

}  // namespace csfast::avx2
