// Nested with AVX2: the unsigned codes of 64 channels, which share a step, against their int8
// activations, in pairs to 16 bits and on to 32; eight parts of the group's integer times the
// step's factor.
//
// Reads codes and exponents once, 2 * (d * bits / 8 + d / 64) bytes a neuron and level, with some
// eighty instructions a cache line at three bits.
#include "csfast/nested.h"

#include <immintrin.h>

#include <bit>
#include <limits>

#include "factor.h"
#include "isa/avx2/number.h"
#include "isa/avx2/planes.h"
#include "loops.h"

namespace csfast::avx2 {
namespace {

// Twice the products of the two pairs of a group that meet in 16 bits.
static_assert(2 * 2 * 2 * ((1 << kBitsMax) - 1) * 127 <= std::numeric_limits<int16_t>::max());

// kRows rows of the batch at once, so that the codes are decoded once for all.
template <int kBits, int kRows>
void measure_rows(const NestedLevel& level, int64_t rows, int64_t d, const int8_t* q, bool more,
                  float* y, int64_t y_stride) {
  const int64_t chunks = chunks_of(d);
  const int64_t q_stride = q_width(d);
  const __m256i most = _mm256_set1_epi8((1 << kBits) - 1);
  const __m256i one = _mm256_set1_epi16(1);
  const uint8_t* codes = level.codes;
  const uint8_t* exponent = level.exponent;
  for (int64_t r = 0; r < rows; ++r) {
    __m256 sums[kRows] = {};
    for (int64_t k = 0; k < chunks; ++k, codes += 16 * kBits) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead), _MM_HINT_T0);
      const Codes u = decode<kBits>(codes);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256 factor = _mm256_set1_ps(kFactors.of[*exponent++]);
#pragma GCC unroll 4
        for (int b = 0; b < kRows; ++b) {
          const int8_t* at = q + b * q_stride + k * kChunk + half * kStepGroup;
          const __m256i q0 = load_bytes(at);
          const __m256i q1 = load_bytes(at + 32);
          const __m256i dot = _mm256_add_epi16(_mm256_maddubs_epi16(u.part[2 * half], q0),
                                               _mm256_maddubs_epi16(u.part[2 * half + 1], q1));
          const __m256i offset =
              _mm256_add_epi16(_mm256_maddubs_epi16(most, q0), _mm256_maddubs_epi16(most, q1));
          const __m256i words = _mm256_sub_epi16(_mm256_add_epi16(dot, dot), offset);
          const __m256 parts = _mm256_cvtepi32_ps(_mm256_madd_epi16(words, one));
          sums[b] = _mm256_fmadd_ps(parts, factor, sums[b]);
        }
      }
    }
    const float half_top = 0.5f * std::bit_cast<float>(uint32_t{level.top[r]} << 16);
#pragma GCC unroll 4
    for (int b = 0; b < kRows; ++b) {
      const float part = half_top * sum_of(sums[b]);
      float& to = y[b * y_stride + r];
      to = more ? to + part : part;
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

}  // namespace csfast::avx2
