// Execute with AVX2: one neuron at a time, its three rows read once.
//
// Reads 3 * d elements a neuron and does four operations on each pair: bound by memory, and as the
// rows of a support lie apart, by how early each is asked for.
#include "csfast/execute.h"

#include <immintrin.h>

#include <algorithm>

#include "avx2/number.h"
#include "avx2/silu.h"
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

    __m256 g[2] = {};  // two chains of additions each, to wait less for either
    __m256 u[2] = {};
    for_lines<T>(p.d, [&](int64_t c, int64_t size) {
      _mm_prefetch(gates + next + c * T::kSize, _MM_HINT_T0);
      _mm_prefetch(ups + next + c * T::kSize, _MM_HINT_T0);
#pragma GCC unroll 4
      for (int64_t e = 0; e < size; e += 8) {
        const int64_t at = (c + e) * T::kSize;
        const __m256 xs = load<T>(x + at, size - e);
        const int chain = e / 8 % 2;
        g[chain] = _mm256_fmadd_ps(load<T>(gates + now + at, size - e), xs, g[chain]);
        u[chain] = _mm256_fmadd_ps(load<T>(ups + now + at, size - e), xs, u[chain]);
      }
    });
    const __m256 a = _mm256_mul_ps(silu(_mm256_set1_ps(sum_of(_mm256_add_ps(g[0], g[1])))),
                                   _mm256_set1_ps(sum_of(_mm256_add_ps(u[0], u[1]))));

    for_lines<T>(p.d, [&](int64_t c, int64_t size) {
      _mm_prefetch(downs + next + c * T::kSize, _MM_HINT_T0);
#pragma GCC unroll 4
      for (int64_t e = 0; e < size; e += 8) {
        const __m256 w = load<T>(downs + now + (c + e) * T::kSize, size - e);
        char* to = reinterpret_cast<char*>(sum + c + e);
        store<F32>(to, _mm256_fmadd_ps(a, w, load<F32>(to, size - e)), size - e);
      }
    });
  }
}

template <typename T>
void finish_row(const float* sums, int64_t n_segments, int64_t d, char* out) {
  for (int64_t c = 0; c < d; c += 8) {
    __m256 total = _mm256_setzero_ps();
    for (int64_t s = 0; s < n_segments; ++s) {
      const char* from = reinterpret_cast<const char*>(sums + s * d + c);
      total = _mm256_add_ps(total, load<F32>(from, d - c));
    }
    store<T>(out + c * T::kSize, total, d - c);
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

}  // namespace csfast::avx2
