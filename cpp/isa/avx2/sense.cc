// Sense with AVX2: the unsigned codes of 32 channels against their int8 activations, in pairs to
// 16 bits and on to 32, exact.
//
// Reads the codes once, 2 * d * bits / 8 bytes a neuron, with about forty instructions a cache line
// at two bits: bound by memory. Ternary codes take ninety a line, and bind one core.
#include "csfast/sense.h"

#include <immintrin.h>

#include <algorithm>
#include <limits>

#include "isa/avx2/number.h"
#include "isa/avx2/planes.h"
#include "loops.h"

namespace csfast::avx2 {
namespace {

// A pair's products add up to 2 * 15 * 127 at most, so the four pairs of a chunk that meet in 16
// bits come to 15,240: nothing saturates.
static_assert(4 * 2 * ((1 << kBitsMax) - 1) * 127 <= std::numeric_limits<int16_t>::max());

// Adds the products of a chunk to eight sums.
__m256i add_dot(__m256i sums, const Codes& u, const int8_t* q) {
  const __m256i first = _mm256_add_epi16(_mm256_maddubs_epi16(u.part[0], load_bytes(q)),
                                         _mm256_maddubs_epi16(u.part[1], load_bytes(q + 32)));
  const __m256i second = _mm256_add_epi16(_mm256_maddubs_epi16(u.part[2], load_bytes(q + 64)),
                                          _mm256_maddubs_epi16(u.part[3], load_bytes(q + 96)));
  const __m256i wide = _mm256_madd_epi16(_mm256_add_epi16(first, second), _mm256_set1_epi16(1));
  return _mm256_add_epi32(sums, wide);
}

int32_t sum_of(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(1, 0, 3, 2)));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(2, 3, 0, 1)));
  return _mm_cvtsi128_si32(s);
}

// kRows rows of the batch at once, so that the codes are decoded once for all.
template <int kBits, int kRows>
void measure_planes(const uint8_t* codes, int64_t rows, int64_t d, const int8_t* q, int32_t* y,
                    int64_t y_stride) {
  const int64_t chunks = chunks_of(d);
  const int64_t q_stride = q_width(d);
  const __m256i one = _mm256_set1_epi8(1);
  int32_t offset[kRows];  // (2^bits - 1) sum q
  for (int b = 0; b < kRows; ++b) {
    __m256i total = _mm256_setzero_si256();
    for (int64_t k = 0; k < chunks; ++k) {
      total = add_dot(total, {{one, one, one, one}}, q + b * q_stride + k * kChunk);
    }
    offset[b] = ((1 << kBits) - 1) * sum_of(total);
  }
  for (int64_t r = 0; r < rows; ++r) {
    __m256i sums[kRows] = {};
    for (int64_t k = 0; k < chunks; ++k, codes += 16 * kBits) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead), _MM_HINT_T0);
      const Codes u = decode<kBits>(codes);
#pragma GCC unroll 4
      for (int b = 0; b < kRows; ++b) {
        sums[b] = add_dot(sums[b], u, q + b * q_stride + k * kChunk);
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < kRows; ++b) y[b * y_stride + r] = 2 * sum_of(sums[b]) - offset[b];
  }
}

// Five digits of 32 bytes, each times one activation, at most 2 * 2 * 127 a pair.
static_assert(kTrits * 2 * 2 * 127 <= std::numeric_limits<int16_t>::max());

__m256i load_half(const void* p) {  // 16 bytes, then zeros
  return _mm256_zextsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}

// Ternary rows. A digit is how many of 86 and 171 its byte reaches, which is 3 byte / 256; bytes
// are compared with their upper bit flipped, as signed ones, and tripling leaves it flipped.
template <int kRows>
void measure_ternary(const uint8_t* codes, int64_t rows, int64_t d, const int8_t* q, int32_t* y,
                     int64_t y_stride) {
  const int64_t width = row_bytes(d, Code::kTernary);
  const int64_t q_stride = q_width(d);
  const __m256i one = _mm256_set1_epi16(1);
  int32_t offset[kRows];  // sum q
  for (int b = 0; b < kRows; ++b) {
    __m256i total = _mm256_setzero_si256();
    for (int64_t c = 0; c < q_stride; c += 32) {
      const __m256i pairs =
          _mm256_maddubs_epi16(_mm256_set1_epi8(1), load_bytes(q + b * q_stride + c));
      total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, one));
    }
    offset[b] = sum_of(total);
  }
  for (int64_t r = 0; r < rows; ++r, codes += width) {
    __m256i sums[kRows] = {};
    const auto add = [&](int64_t i, auto load) {
      __m256i byte = _mm256_xor_si256(load(codes + i), _mm256_set1_epi8(-128));
      __m256i parts[kRows] = {};
#pragma GCC unroll 5
      for (int k = 0; k < kTrits; ++k) {
        const __m256i reached =
            _mm256_add_epi8(_mm256_cmpgt_epi8(byte, _mm256_set1_epi8(85 - 128)),
                            _mm256_cmpgt_epi8(byte, _mm256_set1_epi8(170 - 128)));
        const __m256i u = _mm256_abs_epi8(reached);
        byte = _mm256_add_epi8(byte, _mm256_add_epi8(byte, byte));
#pragma GCC unroll 4
        for (int b = 0; b < kRows; ++b) {
          const __m256i at = load(q + b * q_stride + k * width + i);
          parts[b] = _mm256_add_epi16(parts[b], _mm256_maddubs_epi16(u, at));
        }
      }
#pragma GCC unroll 4
      for (int b = 0; b < kRows; ++b) {
        sums[b] = _mm256_add_epi32(sums[b], _mm256_madd_epi16(parts[b], one));
      }
    };
    int64_t i = 0;
    for (; i + 32 <= width; i += 32) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + i + kAhead), _MM_HINT_T0);
      add(i, load_bytes);
    }
    if (i < width) add(i, load_half);
#pragma GCC unroll 4
    for (int b = 0; b < kRows; ++b) y[b * y_stride + r] = sum_of(sums[b]) - offset[b];
  }
}

// Calls f.operator()<kRows>(q, y) for all rows of the batch, as many at once as f can take.
template <typename F>
void for_batch(int64_t d, const int8_t* q, int64_t batch, int32_t* y, int64_t y_stride, F&& f) {
  int64_t b = 0;
  const auto run = [&]<int kRows>() {
    for (; b + kRows <= batch; b += kRows) {
      f.template operator()<kRows>(q + b * q_width(d), y + b * y_stride);
    }
  };
  run.template operator()<4>();
  run.template operator()<2>();
  run.template operator()<1>();
}

float max_of(__m256 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

template <typename T>
float quantize_row(const char* x, const float* equal, int64_t d, int8_t* q) {
  const auto evened = [&](int64_t c) {  // eight channels from c on, zeros beyond d
    return _mm256_mul_ps(load<T>(x + c * T::kSize, d - c),
                         load<F32>(reinterpret_cast<const char*>(equal + c), d - c));
  };
  const __m256 largest = _mm256_set1_ps(std::numeric_limits<float>::max());
  __m256 peaks = _mm256_setzero_ps();
  bool finite = true;
  for (int64_t c = 0; c < d; c += 8) {
    const __m256 e = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), evened(c));
    finite = finite && _mm256_movemask_ps(_mm256_cmp_ps(e, largest, _CMP_LE_OQ)) == 0xff;
    peaks = _mm256_max_ps(peaks, e);
  }
  std::fill(q, q + q_width(d), int8_t{0});
  if (!finite) return std::numeric_limits<float>::quiet_NaN();
  const float peak = max_of(peaks);
  if (peak == 0.0f) return 0.0f;
  const __m256 inverse = _mm256_set1_ps(127.0f / peak);
  for (int64_t c = 0; c < d; c += 8) {
    const __m256 scaled = _mm256_mul_ps(evened(c), inverse);
    // 127 / peak overflows below 3.7e-37, and then 0 times it is not a number: 0 stays 0.
    const __m256 number = _mm256_cmp_ps(scaled, scaled, _CMP_ORD_Q);
    const __m256 clamped =
        _mm256_min_ps(_mm256_set1_ps(127.0f), _mm256_max_ps(_mm256_set1_ps(-127.0f), scaled));
    const __m256i rounded = _mm256_cvtps_epi32(_mm256_round_ps(
        _mm256_and_ps(number, clamped), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    // q goes on to the end of its chunk, with zeros, which these are.
    _mm_storel_epi64(reinterpret_cast<__m128i*>(q + c), _mm_packs_epi16(words, words));
  }
  return peak / 127.0f;
}

}  // namespace

float quantize(const void* x, const float* equal, int64_t d, DType dtype, int8_t* q) noexcept {
  return dispatch(dtype, [&]<typename T>() {
    return quantize_row<T>(static_cast<const char*>(x), equal, d, q);
  });
}

void measure(const uint8_t* codes, int64_t rows, int64_t d, Code code, const int8_t* q,
             int64_t batch, int32_t* y, int64_t y_stride) noexcept {
  const auto planes = [&]<int kBits>() {
    for_batch(d, q, batch, y, y_stride, [&]<int kRows>(const int8_t* at, int32_t* to) {
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
      for_batch(d, q, batch, y, y_stride, [&]<int kRows>(const int8_t* at, int32_t* to) {
        measure_ternary<kRows>(codes, rows, d, at, to, y_stride);
      });
  }
}

}  // namespace csfast::avx2
