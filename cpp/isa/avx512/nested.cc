// Nested with VNNI: the unsigned codes of 64 channels, which share a step, against their int8
// activations in one instruction; sixteen parts of the group's integer times the step's factor.
//
// Reads codes and exponents once, 2 * (d * bits / 8 + d / 64) bytes a neuron and level. A group
// costs a conversion, a multiply-add and a quarter of two others beside the product that sense has,
// a third more instructions at three bits: bound by memory where two cores share it, by one core
// alone.
#include "csfast/nested.h"

#include <immintrin.h>

#include <algorithm>
#include <bit>

#include "factor.h"
#include "isa/avx512/planes.h"
#include "loops.h"

namespace csfast::avx512 {
namespace {

void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

// Rows of codes at once, gate and up of two neurons: the sum of q is taken once for all of them.
constexpr int kWide = 4;
constexpr int64_t kExponentsAhead = 512;  // bytes, where a few rows have fewer

// kRows rows of the batch at once, so that the codes are decoded once for all. A function of its
// own: inlined, its addresses do not stay in registers.
template <int kBits, int kRows>
[[gnu::noinline]] void measure_rows(const NestedLevel& level, int64_t rows, int64_t d,
                                    const int8_t* q, bool more, float* y, int64_t y_stride) {
  const int64_t chunks = chunks_of(d);
  const int64_t q_stride = q_width(d);
  const int64_t code_bytes = chunks * 16 * kBits;
  const int64_t groups = 2 * chunks;
  const __m512i most = _mm512_set1_epi8((1 << kBits) - 1);
  for (int64_t first = 0; first < rows; first += kWide) {
    // The last neuron may be measured twice, but is written once.
    const int64_t here = std::min<int64_t>(rows - first, kWide);
    const int64_t second = first + here - 2;
    const uint8_t* codes[2] = {level.codes + first * code_bytes, level.codes + second * code_bytes};
    const uint8_t* exponent[2] = {level.exponent + first * groups,
                                  level.exponent + second * groups};
    // What the next rows will read is fetched in the order of memory: in theirs, four streams of
    // short rows, it came at half the speed (d = 2048, four bits).
    const uint8_t* codes_ahead = codes[0] + std::max(kAhead, kWide * code_bytes);
    const uint8_t* exponents_ahead = exponent[0] + kWide * groups + kExponentsAhead;
    for (int64_t i = 0; i < kWide * groups; i += 64) prefetch(exponents_ahead + i);
    prefetch(level.top + first + kWide * 16);
    __m512 sums[kWide][kRows] = {};
    for (int64_t k = 0; k < chunks; ++k) {
      Codes twice[kWide];
#pragma GCC unroll 4
      for (int r = 0; r < kWide; ++r) {
        const uint8_t* chunk = codes[r / 2] + r % 2 * code_bytes + k * 16 * kBits;
        prefetch(codes_ahead + (k * kWide + r) * 16 * kBits);
        twice[r] = decode<kBits, 2>(chunk);
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int64_t g = 2 * k + half;
#pragma GCC unroll 4
        for (int b = 0; b < kRows; ++b) {
          const __m512i at = load_q(q + b * q_stride + g * kStepGroup);
          const __m512i opposite = _mm512_sub_epi8(_mm512_setzero_si512(), at);
          const __m512i offset = _mm512_dpbusd_epi32(_mm512_setzero_si512(), most, opposite);
#pragma GCC unroll 4
          for (int r = 0; r < kWide; ++r) {
            const float factor = kFactors.of[exponent[r / 2][r % 2 * groups + g]];
            const __m512i parts = _mm512_dpbusd_epi32(offset, twice[r].half[half], at);
            sums[r][b] =
                _mm512_fmadd_ps(_mm512_cvtepi32_ps(parts), _mm512_set1_ps(factor), sums[r][b]);
          }
        }
      }
    }
    for (int64_t r = 0; r < here; ++r) {
      const float half_top = 0.5f * std::bit_cast<float>(uint32_t{level.top[first + r]} << 16);
#pragma GCC unroll 4
      for (int b = 0; b < kRows; ++b) {
        const float part = half_top * _mm512_reduce_add_ps(sums[r][b]);
        float& to = y[b * y_stride + first + r];
        to = more ? to + part : part;
      }
    }
  }
}

}  // namespace

void measure_level(const NestedLevel& level, int64_t n, int64_t d, const int8_t* q, int64_t batch,
                   bool more, float* y, int64_t y_stride) noexcept {
  const auto of = [&]<int kBits>() {
    int64_t b = 0;
    const auto run = [&]<int kRows>() {
      for (; b + kRows <= batch; b += kRows) {
        measure_rows<kBits, kRows>(level, 2 * n, d, q + b * q_width(d), more, y + b * y_stride,
                                   y_stride);
      }
    };
    run.template operator()<4>();
    run.template operator()<2>();
    run.template operator()<1>();
  };
  switch (level.bits) {
    case 1:
      return of.template operator()<1>();
    case 2:
      return of.template operator()<2>();
    case 3:
      return of.template operator()<3>();
    default:
      return of.template operator()<4>();
  }
}

}  // namespace csfast::avx512
