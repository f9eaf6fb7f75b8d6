#include "csfast/recover.h"

#include <cmath>

#include "loops.h"

namespace csfast::base {

Kept keep(const int32_t* y, float scale, const float* row_scale, int64_t n, float threshold,
          float* usage) noexcept {
  Kept kept{0, 0.0f};
  for (int64_t i = 0; i < n; ++i) {
    const float g = scale * row_scale[2 * i] * static_cast<float>(y[2 * i]);
    const float u = scale * row_scale[2 * i + 1] * static_cast<float>(y[2 * i + 1]);
    usage[i] = std::fabs(g / (1.0f + std::exp(-g)) * u);
    if (usage[i] < threshold) {
      kept.missed += usage[i] * usage[i];
    } else {
      kept.mask |= uint64_t{1} << i;
    }
  }
  return kept;
}

}  // namespace csfast::base
