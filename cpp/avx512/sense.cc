// Sense with VNNI: the unsigned codes of 64 channels against their int8 activations in one
// instruction, exact in int32.
//
// Reads the codes once, 2 * d * bits / 8 bytes a neuron, with about fourteen instructions a cache
// line: bound by memory.
#include "csfast/sense.h"

#include <immintrin.h>

#include <algorithm>
#include <limits>

#include "loops.h"

namespace csfast::avx512 {
namespace {

constexpr int64_t kAhead =
    4096;  // bytes: one page, at whose end the processor's own prefetch stops

// Sixteen channels of an activation as float32, zero where the mask is.
__m512 load(const void* x, int64_t c, DType dtype, __mmask16 mask) {
  if (dtype == DType::kF32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + c);
  const __m256i v = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + c);
  if (dtype == DType::kF16) return _mm512_cvtph_ps(v);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

constexpr __mmask16 mask_of(int64_t n) {
  return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1);
}

struct Codes {
  __m512i lower, upper;  // channels 0 .. 63 and 64 .. 127 of a chunk, a byte each
};

Codes pairs(const uint8_t* p) {
  const __m512i both =
      _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i by_0_2 = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
  const __m512i by_4_6 = _mm512_add_epi16(by_0_2, _mm512_set1_epi16(4));
  const __m512i three = _mm512_set1_epi8(3);
  return {_mm512_and_si512(_mm512_srlv_epi16(both, by_0_2), three),
          _mm512_and_si512(_mm512_srlv_epi16(both, by_4_6), three)};
}

__mmask64 bits_at(const uint8_t* p) {
  return _load_mask64(reinterpret_cast<__mmask64*>(const_cast<uint8_t*>(p)));
}

template <int kBits>
Codes decode(const uint8_t* p) {
  if constexpr (kBits == 1) {
    return {_mm512_maskz_set1_epi8(bits_at(p), 1), _mm512_maskz_set1_epi8(bits_at(p + 8), 1)};
  }
  Codes codes = pairs(p);
  if constexpr (kBits == 3) {
    const __m512i four = _mm512_set1_epi8(4);
    codes.lower = _mm512_mask_add_epi8(codes.lower, bits_at(p + 32), codes.lower, four);
    codes.upper = _mm512_mask_add_epi8(codes.upper, bits_at(p + 40), codes.upper, four);
  }
  if constexpr (kBits == 4) {  // a code is below 4, so shifting words never crosses a byte
    const Codes high = pairs(p + 32);
    codes.lower = _mm512_or_si512(codes.lower, _mm512_slli_epi16(high.lower, 2));
    codes.upper = _mm512_or_si512(codes.upper, _mm512_slli_epi16(high.upper, 2));
  }
  return codes;
}

__m512i load_q(const int8_t* q) {
  return _mm512_loadu_si512(q);
}

// kRows rows of the batch at once, so that the codes are decoded once for all.
template <int kBits, int kRows>
void measure_rows(const uint8_t* codes, int64_t rows, int64_t chunks, const int8_t* q, int32_t* y,
                  int64_t y_stride) {
  int32_t offset[kRows];  // (2^bits - 1) sum q
  for (int b = 0; b < kRows; ++b) {
    __m512i total = _mm512_setzero_si512();
    for (int64_t c = 0; c < chunks * kChunk; c += 64) {
      total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), load_q(q + b * chunks * kChunk + c));
    }
    offset[b] = ((1 << kBits) - 1) * _mm512_reduce_add_epi32(total);
  }
  for (int64_t r = 0; r < rows; ++r) {
    __m512i lower[kRows] = {};
    __m512i upper[kRows] = {};
    for (int64_t k = 0; k < chunks; ++k, codes += 16 * kBits) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead), _MM_HINT_T0);
      const Codes u = decode<kBits>(codes);
#pragma GCC unroll 4
      for (int b = 0; b < kRows; ++b) {
        const int8_t* at = q + (b * chunks + k) * kChunk;
        lower[b] = _mm512_dpbusd_epi32(lower[b], u.lower, load_q(at));
        upper[b] = _mm512_dpbusd_epi32(upper[b], u.upper, load_q(at + 64));
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < kRows; ++b) {
      const int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(lower[b], upper[b]));
      y[b * y_stride + r] = 2 * sum - offset[b];
    }
  }
}

template <int kBits>
void measure_bits(const uint8_t* codes, int64_t rows, int64_t chunks, const int8_t* q,
                  int64_t batch, int32_t* y, int64_t y_stride) {
  int64_t b = 0;
  const auto run = [&]<int kRows>() {
    for (; b + kRows <= batch; b += kRows) {
      measure_rows<kBits, kRows>(codes, rows, chunks, q + b * chunks * kChunk, y + b * y_stride,
                                 y_stride);
    }
  };
  run.template operator()<4>();
  run.template operator()<2>();
  run.template operator()<1>();
}

}  // namespace

float quantize(const void* x, const float* equal, int64_t d, DType dtype, int8_t* q) noexcept {
  const __m512 largest = _mm512_set1_ps(std::numeric_limits<float>::max());
  __m512 peaks = _mm512_setzero_ps();
  bool finite = true;
  for (int64_t c = 0; c < d; c += 16) {
    const __mmask16 mask = mask_of(d - c);
    const __m512 e = _mm512_abs_ps(
        _mm512_mul_ps(load(x, c, dtype, mask), _mm512_maskz_loadu_ps(mask, equal + c)));
    finite = finite && _mm512_cmp_ps_mask(e, largest, _CMP_LE_OQ) == 0xffff;
    peaks = _mm512_max_ps(peaks, e);
  }
  std::fill(q, q + chunks_of(d) * kChunk, int8_t{0});
  if (!finite) return std::numeric_limits<float>::quiet_NaN();
  const float peak = _mm512_reduce_max_ps(peaks);
  if (peak == 0.0f) return 0.0f;
  const __m512 inverse = _mm512_set1_ps(127.0f / peak);
  for (int64_t c = 0; c < d; c += 16) {
    const __mmask16 mask = mask_of(d - c);
    const __m512 e = _mm512_mul_ps(load(x, c, dtype, mask), _mm512_maskz_loadu_ps(mask, equal + c));
    const __m512 scaled = _mm512_mul_ps(e, inverse);
    // 127 / peak overflows below 3.7e-37, and then 0 times it is not a number: 0 stays 0.
    const __mmask16 number = _mm512_cmp_ps_mask(scaled, scaled, _CMP_ORD_Q);
    const __m512 clamped = _mm512_maskz_min_ps(number, _mm512_set1_ps(127.0f),
                                               _mm512_max_ps(_mm512_set1_ps(-127.0f), scaled));
    const __m512i rounded =
        _mm512_cvt_roundps_epi32(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm512_mask_cvtepi32_storeu_epi8(q + c, mask, rounded);
  }
  return peak / 127.0f;
}

void measure(const uint8_t* codes, int64_t rows, int64_t chunks, int bits, const int8_t* q,
             int64_t batch, int32_t* y, int64_t y_stride) noexcept {
  switch (bits) {
    case 1:
      return measure_bits<1>(codes, rows, chunks, q, batch, y, y_stride);
    case 2:
      return measure_bits<2>(codes, rows, chunks, q, batch, y, y_stride);
    case 3:
      return measure_bits<3>(codes, rows, chunks, q, batch, y, y_stride);
    default:
      return measure_bits<4>(codes, rows, chunks, q, batch, y, y_stride);
  }
}

}  // namespace csfast::avx512
