#include "csfast/nested.h"

#include "factor.h"
#include "isa/base/number.h"
#include "isa/base/planes.h"
#include "loops.h"

namespace csfast::base {

static_assert(kHalf == kStepGroup);

void measure_level(const NestedLevel& level, int64_t n, int64_t d, const int8_t* q, int64_t batch,
                   bool more, float* y, int64_t y_stride) noexcept {
  const int64_t groups = step_groups_of(d);
  const int most = (1 << level.bits) - 1;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t r = 0; r < 2 * n; ++r) {
      const uint8_t* codes = level.codes + r * chunks_of(d) * 16 * level.bits;
      const uint8_t* exponent = level.exponent + r * groups;
      float sum = 0.0f;
      for (int64_t g = 0; g < groups; ++g) {
        const int8_t* at = q + b * q_width(d) + g * kHalf;
        const uint8_t* chunk = codes + g / 2 * 16 * level.bits;
        const int32_t dot = dot_half(chunk, level.bits, static_cast<int>(g % 2), at);
        sum += kFactors.of[exponent[g]] * static_cast<float>(2 * dot - most * sum_of(at, kHalf));
      }
      const float part = 0.5f * to_float(BFloat16{level.top[r]}) * sum;
      float& to = y[b * y_stride + r];
      to = more ? to + part : part;
    }
  }
}

}  // namespace csfast::base
