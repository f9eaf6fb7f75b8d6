#include "csfast/recover.h"

#include <cmath>

#include "isa/base/activation.h"
#include "loops.h"

namespace csfast::base {
namespace {

template <typename Y>
void usage_of(const Measured& m, int64_t n, float* usage) {
  const Y* y = static_cast<const Y*>(m.y);
  const auto value = [&](int64_t i) {
    const float v = m.scale * m.row_scale[i] * static_cast<float>(y[i]);
    return m.offset == nullptr ? v : v + m.offset[i];
  };
  for (int64_t i = 0; i < n; ++i) {
    usage[i] = std::fabs(m.columns == 1 ? value(i)
                                        : activate(m.activation, value(2 * i)) * value(2 * i + 1));
  }
}

}  // namespace

void usage(const Measured& m, int64_t n, float* usage) noexcept {
  m.is_float ? usage_of<float>(m, n, usage) : usage_of<int32_t>(m, n, usage);
}

Kept keep(const float* usage, int64_t n, float threshold) noexcept {
  Kept kept{0, 0.0f};
  for (int64_t i = 0; i < n; ++i) {
    if (usage[i] < threshold) {
      kept.missed += usage[i] * usage[i];
    } else {
      kept.mask |= uint64_t{1} << i;
    }
  }
  return kept;
}

}  // namespace csfast::base
