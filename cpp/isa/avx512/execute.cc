// Execute with AVX-512: a few neurons at a time, their rows read once.
//
// Reads 3 * d elements a neuron and does four operations on each pair: bound by memory, and as the
// rows of a support lie apart, by how early and how many at a time are asked for.
#include "csfast/execute.h"

#include <immintrin.h>

#include <algorithm>

#include "isa/avx512/activation.h"
#include "isa/avx512/number.h"
#include "loops.h"

namespace csfast::avx512 {
namespace {

// Neurons that one row of the batch goes through together, while as many that follow are asked for,
// into the second-level cache: the first has too few places for lines that are on their way. One
// core, d = 2048, bfloat16, a quarter of the neurons one by one and in blocks of 16: 1, 2, 4 and 8
// together read .61, .76, .75, .46 and .80, .86, .85, .49 of what plain reading does; 4 into the
// first-level cache .60 and .68 (AMD EPYC, 2026-11-25, every second line asked for).
constexpr int kTogether = 4;

// Calls f(offset in elements, mask) for every 64 bytes of a row.
template <typename T, typename F>
inline void for_lines(int64_t d, F&& f) {
  constexpr int64_t kStep = 64 / T::kSize;
  int64_t c = 0;
  for (; c + kStep <= d; c += kStep) f(c, T::kAll);
  if (c < d) f(c, static_cast<typename T::Mask>((uint64_t{1} << (d - c)) - 1));
}

// Sixteen floats of a line are its part k.
inline __mmask16 mask_of_part(uint32_t mask, int k) {
  return static_cast<__mmask16>(mask >> 16 * k);
}

// The line of a row as floats, see Line.
template <typename T>
inline Line<T> load(const char* w, typename T::Mask mask) {
  const Line<T> line = T::widen(T::load(w, mask));
  return mask == T::kAll ? line : T::in_order(line);
}

// The line of a sum: its floats are where those of a row's are.
template <typename T>
inline Line<T> load_sum(const float* sum, typename T::Mask mask) {
  Line<T> line;
#pragma GCC unroll 2
  for (int k = 0; k < T::kParts; ++k) {
    line.part[k] = mask == T::kAll ? _mm512_loadu_ps(sum + 16 * k)
                                   : _mm512_maskz_loadu_ps(mask_of_part(mask, k), sum + 16 * k);
  }
  return line;
}

template <typename T>
inline void store_sum(float* sum, const Line<T>& line, typename T::Mask mask) {
#pragma GCC unroll 2
  for (int k = 0; k < T::kParts; ++k) {
    if (mask == T::kAll) {
      _mm512_storeu_ps(sum + 16 * k, line.part[k]);
    } else {
      _mm512_mask_storeu_ps(sum + 16 * k, mask_of_part(mask, k), line.part[k]);
    }
  }
}

template <typename T>
inline void add(Line<T>& total, const Line<T>& line) {
#pragma GCC unroll 2
  for (int k = 0; k < T::kParts; ++k) total.part[k] = _mm512_add_ps(total.part[k], line.part[k]);
}

// z + entry j of bias, unless that is null; both in every lane.
template <typename T>
inline __m512 add_bias(__m512 z, const void* bias, int64_t j) {
  if (bias == nullptr) return z;
  const Line<T> v = load<T>(static_cast<const char*>(bias) + j * T::kSize, 1);
  return _mm512_add_ps(z, _mm512_broadcastss_ps(_mm512_castps512_ps128(v.part[0])));
}

// Where the rows of a neuron are, and how far it is from them to those that are asked for.
struct Neuron {
  const char* gate;
  const char* up;
  const char* down;
  int64_t ahead;
  int64_t index;
};

// The neurons from i on, of a list that is known up to `end`.
template <typename T, int kNeurons>
inline void find(const ExecuteParams& p, const int32_t* neuron, int64_t i, int64_t end,
                 Neuron* of) {
  const int64_t row = p.form.d * T::kSize;
  for (int k = 0; k < kNeurons; ++k) {
    const int64_t now = neuron[i + k];
    const int64_t next = neuron[std::min(i + k + kNeurons, end - 1)];
    of[k] = {.gate = static_cast<const char*>(p.weights.gate) + now * row,
             .up = static_cast<const char*>(p.weights.up) + now * row,
             .down = static_cast<const char*>(p.weights.down_t) + now * row,
             .ahead = (next - now) * row,
             .index = now};
  }
}

// a[r][i] = the activation of neuron of[i] for row r of x, where that is wanted (kDots), while what
// the neurons `last`, whose activations are in a before, contribute is added to the sums, where
// that is (kAdds). A neuron's sums, and the order in which neurons add to a row, are the same for
// every number of either.
template <typename T, int kNeurons, int kRows, bool kDots, bool kAdds>
inline void go_through(const ExecuteParams& p, const Neuron* of, const Neuron* last, const char* x,
                       float* sum, int64_t sum_stride, __m512 (*a)[kNeurons]) {
  const int64_t row = p.form.d * T::kSize;
  __m512 g[kRows][kNeurons] = {};
  __m512 u[kRows][kNeurons] = {};
  if constexpr (kDots) {
    // Where a row ends on another page than it begins, that page is looked up early.
#pragma GCC unroll 4
    for (int i = 0; i < kNeurons; ++i) {
      _mm_prefetch(of[i].gate + of[i].ahead + row - 1, _MM_HINT_T1);
      _mm_prefetch(of[i].up + of[i].ahead + row - 1, _MM_HINT_T1);
      _mm_prefetch(of[i].down + of[i].ahead + row - 1, _MM_HINT_T1);
    }
  }
  for_lines<T>(p.form.d, [&](int64_t c, typename T::Mask mask) {
    const int64_t at = c * T::kSize;
    if constexpr (kDots) {
#pragma GCC unroll 4
      for (int i = 0; i < kNeurons; ++i) {
        _mm_prefetch(of[i].gate + of[i].ahead + at, _MM_HINT_T1);
        _mm_prefetch(of[i].up + of[i].ahead + at, _MM_HINT_T1);
        _mm_prefetch(of[i].down + of[i].ahead + at, _MM_HINT_T1);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          g[r][i] = T::dot(g[r][i], of[i].gate + at, x + r * row + at, mask);
          u[r][i] = T::dot(u[r][i], of[i].up + at, x + r * row + at, mask);
        }
      }
    }
    if constexpr (kAdds) {
      Line<T> w[kNeurons];
#pragma GCC unroll 4
      for (int i = 0; i < kNeurons; ++i) w[i] = load<T>(last[i].down + at, mask);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        Line<T> total = load_sum<T>(sum + r * sum_stride + c, mask);
#pragma GCC unroll 4
        for (int i = 0; i < kNeurons; ++i) {
#pragma GCC unroll 2
          for (int k = 0; k < T::kParts; ++k) {
            total.part[k] = _mm512_fmadd_ps(a[r][i], w[i].part[k], total.part[k]);
          }
        }
        store_sum<T>(sum + r * sum_stride + c, total, mask);
      }
    }
  });
  if constexpr (kDots) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kNeurons; ++i) {
        const __m512 gated = _mm512_set1_ps(_mm512_reduce_add_ps(g[r][i]));
        const __m512 upped = _mm512_set1_ps(_mm512_reduce_add_ps(u[r][i]));
        a[r][i] = _mm512_mul_ps(
            activate(p.form.activation, add_bias<T>(gated, p.weights.gate_bias, of[i].index)),
            add_bias<T>(upped, p.weights.up_bias, of[i].index));
      }
    }
  }
}

// What the neurons from i on contribute to one row, kNeurons at a time: their products are taken
// while the neurons before them are added, so that all three tables are read at any time. Returns
// how many it went through.
template <typename T, int kNeurons>
inline int64_t gather_row(const ExecuteParams& p, const Rows& rows, const int32_t* neuron,
                          int64_t i, int64_t n, int64_t end) {
  if (i + kNeurons > n) return i;
  const char* x = static_cast<const char*>(rows.x);
  __m512 a[1][kNeurons];
  Neuron of[kNeurons], last[kNeurons];
  find<T, kNeurons>(p, neuron, i, end, last);
  go_through<T, kNeurons, 1, true, false>(p, last, nullptr, x, nullptr, 0, a);
  for (i += kNeurons; i + kNeurons <= n; i += kNeurons) {
    find<T, kNeurons>(p, neuron, i, end, of);
    go_through<T, kNeurons, 1, true, true>(p, of, last, x, rows.sum, 0, a);
    std::copy(of, of + kNeurons, last);
  }
  go_through<T, kNeurons, 1, false, true>(p, nullptr, last, x, rows.sum, 0, a);
  return i;
}

// Neurons whose products with kRows rows are summed at once: at most 16 sums, half of the
// registers.
template <int kRows>
constexpr int kDots = std::min(8 / kRows, kTogether);

// The same for several rows, for which the neurons stay in the cache.
template <typename T, int kNeurons>
inline int64_t gather_rows(const ExecuteParams& p, const Rows& rows, const int32_t* neuron,
                           int64_t i, int64_t n, int64_t end) {
  for (; i + kNeurons <= n; i += kNeurons) {
    Neuron of[kNeurons];
    find<T, kNeurons>(p, neuron, i, end, of);
    int64_t r = 0;
    const auto run = [&]<int kRows>() {
      for (; r + kRows <= rows.n; r += kRows) {
        const char* x = static_cast<const char*>(rows.x) + r * p.form.d * T::kSize;
        float* sum = rows.sum + r * rows.sum_stride;
        __m512 a[kRows][kNeurons];
        constexpr int kStep = std::min(kDots<kRows>, kNeurons);
#pragma GCC unroll 4
        for (int k = 0; k < kNeurons; k += kStep) {
          __m512 some[kRows][kStep];
          go_through<T, kStep, kRows, true, false>(p, of + k, nullptr, x, nullptr, 0, some);
#pragma GCC unroll 4
          for (int b = 0; b < kRows; ++b) std::copy(some[b], some[b] + kStep, a[b] + k);
        }
        go_through<T, kNeurons, kRows, false, true>(p, nullptr, of, x, sum, rows.sum_stride, a);
      }
    };
    run.template operator()<4>();
    run.template operator()<2>();
    run.template operator()<1>();
  }
  return i;
}

// Lines of a row that are added up at a time: what another core has written comes sooner when more
// is asked of it, 5 us instead of 8 for 32 segments of d = 2048.
constexpr int kLines = 4;

// The sum of line c of all segments and of those that follow it, kCount in all.
template <typename T, int kCount>
inline void finish_lines(const float* sums, int64_t n_segments, int64_t d, int64_t c,
                         typename T::Mask mask, const char* bias, char* out) {
  constexpr int64_t kStep = 64 / T::kSize;
  Line<T> total[kCount] = {};
  for (int64_t s = 0; s < n_segments; ++s) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) add(total[i], load_sum<T>(sums + s * d + c + i * kStep, mask));
  }
  for (int i = 0; i < kCount; ++i) {
    const int64_t at = (c + i * kStep) * T::kSize;
    if (bias != nullptr) add(total[i], load<T>(bias + at, mask));
    const Line<T> line = mask == T::kAll ? T::in_order(total[i]) : total[i];
#pragma GCC unroll 2
    for (int k = 0; k < T::kParts; ++k) {
      T::store(out + at + 16 * k * T::kSize, line.part[k], mask_of_part(mask, k));
    }
  }
}

template <typename T>
void finish_row(const float* sums, int64_t n_segments, int64_t d, const char* bias, char* out) {
  constexpr int64_t kMany = kLines * 64 / T::kSize;
  int64_t c = 0;
  for (; c + kMany <= d; c += kMany) {
    finish_lines<T, kLines>(sums, n_segments, d, c, T::kAll, bias, out);
  }
  for_lines<T>(d - c, [&](int64_t e, typename T::Mask mask) {
    finish_lines<T, 1>(sums, n_segments, d, c + e, mask, bias, out);
  });
}

}  // namespace

void gather(const ExecuteParams& p, const Rows& rows, const int32_t* neuron, int64_t n,
            int64_t n_ahead, bool first) noexcept {
  for (int64_t r = 0; first && r < rows.n; ++r) {
    std::fill_n(rows.sum + r * rows.sum_stride, p.form.d, 0.0f);
  }
  dispatch(p.form.dtype, [&]<typename T>() {
    const int64_t end = n + n_ahead;
    if (rows.n == 1) {
      const int64_t i = gather_row<T, kTogether>(p, rows, neuron, 0, n, end);
      gather_row<T, 1>(p, rows, neuron, i, n, end);
    } else {
      const int64_t i = gather_rows<T, kTogether>(p, rows, neuron, 0, n, end);
      gather_rows<T, 1>(p, rows, neuron, i, n, end);
    }
  });
}

void finish(const float* sums, int64_t n_segments, int64_t d, DType dtype, const void* bias,
            void* out) noexcept {
  dispatch(dtype, [&]<typename T>() {
    finish_row<T>(sums, n_segments, d, static_cast<const char*>(bias), static_cast<char*>(out));
  });
}

}  // namespace csfast::avx512
