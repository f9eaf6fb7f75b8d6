#include "csfast/sense.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "isa/base/number.h"
#include "isa/base/planes.h"
#include "loops.h"

namespace csfast::base {
namespace {

int32_t dot_planes(const uint8_t* p, int64_t d, int bits, const int8_t* q) {
  int32_t acc = 0;
  for (int64_t k = 0; k < chunks_of(d); ++k) {
    for (int half = 0; half < 2; ++half) {
      acc += dot_half(p + k * 16 * bits, bits, half, q + k * kChunk + half * kHalf);
    }
  }
  return acc;
}

int32_t dot_trits(const uint8_t* p, int64_t d, const int8_t* q) {
  const int64_t width = row_bytes(d, Code::kTernary);
  int32_t acc = 0;
  for (int64_t i = 0; i < width; i += 16) {
    uint8_t rest[16];
    std::copy_n(p + i, 16, rest);
    for (int k = 0; k < kTrits; ++k) {
      for (int m = 0; m < 16; ++m) {
        const int three = 3 * rest[m];
        acc += (three >> 8) * q[k * width + i + m];
        rest[m] = static_cast<uint8_t>(three);
      }
    }
  }
  return acc;
}

}  // namespace

float quantize(const void* x, const float* equal, int64_t d, DType dtype, int8_t* q) noexcept {
  return dispatch(dtype, [&]<typename T>() {
    const T* row = static_cast<const T*>(x);
    float peak = 0.0f;
    bool finite = true;
    for (int64_t c = 0; c < d; ++c) {
      const float e = std::fabs(to_float(row[c]) * equal[c]);
      finite = finite && e <= std::numeric_limits<float>::max();
      peak = std::max(peak, e);
    }
    std::fill(q, q + q_width(d), int8_t{0});
    if (!finite) return std::numeric_limits<float>::quiet_NaN();
    if (peak == 0.0f) return 0.0f;
    const float inverse = 127.0f / peak;
    for (int64_t c = 0; c < d; ++c) {
      const float v = std::nearbyint(to_float(row[c]) * equal[c] * inverse);
      // 127 / peak overflows below 3.7e-37, and then 0 times it is not a number: 0 stays 0.
      q[c] = v == v ? static_cast<int8_t>(std::clamp(v, -127.0f, 127.0f)) : int8_t{0};
    }
    return peak / 127.0f;
  });
}

void measure(const uint8_t* codes, int64_t rows, int64_t d, Code code, const int8_t* q,
             int64_t batch, int32_t* y, int64_t y_stride) noexcept {
  for (int64_t b = 0; b < batch; ++b) {
    const int8_t* row = q + b * q_width(d);
    const int32_t total = sum_of(row, d);
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* p = codes + r * row_bytes(d, code);
      y[b * y_stride + r] = code == Code::kTernary ? dot_trits(p, d, row) - total
                                                   : 2 * dot_planes(p, d, bits_of(code), row) -
                                                         ((1 << bits_of(code)) - 1) * total;
    }
  }
}

}  // namespace csfast::base
