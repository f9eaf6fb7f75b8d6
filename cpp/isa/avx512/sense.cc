// Sense with VNNI: the unsigned codes of 64 channels against their int8 activations in one
// instruction, exact in int32.
//
// Reads the codes once, 2 * d * bits / 8 bytes a neuron, with about fourteen instructions a cache
// line: bound by memory. Ternary codes take thirty a line, half of them products, and bind one
// core.
#include "csfast/sense.h"

#include <immintrin.h>

#include <algorithm>
#include <limits>

#include "isa/avx512/planes.h"
#include "loops.h"

namespace csfast::avx512 {
namespace {

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

// kRows rows of the batch at once, so that the codes are decoded once for all.
template <int kBits, int kRows>
void measure_planes(const uint8_t* codes, int64_t rows, int64_t d, const int8_t* q, int32_t* y,
                    int64_t y_stride) {
  const int64_t chunks = chunks_of(d);
  const int64_t q_stride = q_width(d);
  int32_t offset[kRows];  // (2^bits - 1) sum q
  for (int b = 0; b < kRows; ++b) {
    __m512i total = _mm512_setzero_si512();
    for (int64_t c = 0; c < chunks * kChunk; c += 64) {
      total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), load_q(q + b * q_stride + c));
    }
    offset[b] = ((1 << kBits) - 1) * _mm512_reduce_add_epi32(total);
  }
  for (int64_t r = 0; r < rows; ++r) {
    __m512i lower[kRows] = {};
    __m512i upper[kRows] = {};
    for (int64_t k = 0; k < chunks; ++k, codes += 16 * kBits) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead), _MM_HINT_T0);
      const Codes u = decode<kBits, 1>(codes);
#pragma GCC unroll 4
      for (int b = 0; b < kRows; ++b) {
        const int8_t* at = q + b * q_stride + k * kChunk;
        lower[b] = _mm512_dpbusd_epi32(lower[b], u.half[0], load_q(at));
        upper[b] = _mm512_dpbusd_epi32(upper[b], u.half[1], load_q(at + 64));
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < kRows; ++b) {
      const int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(lower[b], upper[b]));
      y[b * y_stride + r] = 2 * sum - offset[b];
    }
  }
}

// One lane sums four neighbouring channels of every byte of 64, times 256 at the most.
constexpr int64_t kTernaryLane =
    4 * kTrits * ((row_bytes(kTernaryWidthMax, Code::kTernary) + 63) / 64);  // channels
static_assert(kTernaryLane * 2 * 127 * 256 <= std::numeric_limits<int32_t>::max());

// Ternary rows without taking digits out. With byte_k what is left of a byte after k digits, a
// digit is u_k = (3 byte_k - byte_k+1) / 256, so two products of whole bytes make the sum:
//
//   256 sum u_k q_k = 3 sum byte_k q_k - sum byte_k+1 q_k
//
// where both wrap around in 32 bits and the difference does not.
template <int kRows>
void measure_ternary(const uint8_t* codes, int64_t rows, int64_t d, const int8_t* q, int32_t* y,
                     int64_t y_stride) {
  const int64_t width = row_bytes(d, Code::kTernary);
  const int64_t q_stride = q_width(d);
  int32_t offset[kRows];  // sum q
  for (int b = 0; b < kRows; ++b) {
    __m512i total = _mm512_setzero_si512();
    for (int64_t c = 0; c < q_stride; c += 64) {
      total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), load_q(q + b * q_stride + c));
    }
    offset[b] = _mm512_reduce_add_epi32(total);
  }
  for (int64_t r = 0; r < rows; r += 2) {
    // Two rows at once, to wait less for either's additions; the last may be measured twice.
    const uint8_t* row[2] = {codes + r * width, codes + std::min(r + 1, rows - 1) * width};
    __m512i now[2][kRows] = {};
    __m512i next[2][kRows] = {};
    const auto add = [&](int64_t i, auto load) {
      __m512i byte[2] = {load(row[0] + i), load(row[1] + i)};
#pragma GCC unroll 5
      for (int k = 0; k < kTrits; ++k) {
        __m512i after[2];
#pragma GCC unroll 2
        for (int w = 0; w < 2; ++w)
          after[w] = _mm512_add_epi8(byte[w], _mm512_add_epi8(byte[w], byte[w]));
#pragma GCC unroll 2
        for (int b = 0; b < kRows; ++b) {
          const __m512i at = load(q + b * q_stride + k * width + i);
#pragma GCC unroll 2
          for (int w = 0; w < 2; ++w) {
            now[w][b] = _mm512_dpbusd_epi32(now[w][b], byte[w], at);
            next[w][b] = _mm512_dpbusd_epi32(next[w][b], after[w], at);
          }
        }
        byte[0] = after[0];
        byte[1] = after[1];
      }
    };
    int64_t i = 0;
    for (; i + 64 <= width; i += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(row[0] + i + kAhead), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(row[1] + i + kAhead), _MM_HINT_T0);
      add(i, [](const void* p) { return _mm512_loadu_si512(p); });
    }
    const __mmask64 rest = (uint64_t{1} << (width - i)) - 1;
    if (i < width) add(i, [rest](const void* p) { return _mm512_maskz_loadu_epi8(rest, p); });
#pragma GCC unroll 2
    for (int w = 0; w < 2; ++w) {
#pragma GCC unroll 2
      for (int b = 0; b < kRows; ++b) {
        const __m512i three = _mm512_add_epi32(now[w][b], _mm512_add_epi32(now[w][b], now[w][b]));
        const __m512i sums = _mm512_srai_epi32(_mm512_sub_epi32(three, next[w][b]), 8);
        y[b * y_stride + std::min(r + w, rows - 1)] = _mm512_reduce_add_epi32(sums) - offset[b];
      }
    }
  }
}

// Calls f.operator()<kRows>(q, y) for all rows of the batch, kMost at once where there are so many.
template <int kMost, typename F>
void for_batch(int64_t d, const int8_t* q, int64_t batch, int32_t* y, int64_t y_stride, F&& f) {
  int64_t b = 0;
  const auto run = [&]<int kRows>() {
    for (; b + kRows <= batch; b += kRows) {
      f.template operator()<kRows>(q + b * q_width(d), y + b * y_stride);
    }
  };
  if constexpr (kMost >= 4) run.template operator()<4>();
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
  std::fill(q, q + q_width(d), int8_t{0});
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

void measure(const uint8_t* codes, int64_t rows, int64_t d, Code code, const int8_t* q,
             int64_t batch, int32_t* y, int64_t y_stride) noexcept {
  const auto planes = [&]<int kBits>() {
    for_batch<4>(d, q, batch, y, y_stride, [&]<int kRows>(const int8_t* at, int32_t* to) {
      measure_planes<kBits, kRows>(codes, rows, d, at, to, y_stride);
    });
  };
  switch (code) {
    case Code::kBits1:
      return planes.template operator()<1>();
    case Code::kBits2:
      return planes.template operator()<2>();
    case Code::kBits3:
      return planes.template operator()<3>();
    case Code::kBits4:
      return planes.template operator()<4>();
    case Code::kTernary:
      // The products bound it, not the decoding: four rows at once are slower than two twice.
      for_batch<2>(d, q, batch, y, y_stride, [&]<int kRows>(const int8_t* at, int32_t* to) {
        measure_ternary<kRows>(codes, rows, d, at, to, y_stride);
      });
  }
}

}  // namespace csfast::avx512
