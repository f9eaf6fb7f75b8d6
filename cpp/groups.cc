#include "groups.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace csfast {

float add_squares(const float* usage, int64_t n, float sum) noexcept {
  for (int64_t i = 0; i < n; ++i) sum += usage[i] * usage[i];
  return sum;
}

void group_usage(const float* usage, int64_t n_neurons, int64_t rows, float* group) noexcept {
  for (int64_t first = 0; first < n_neurons; first += rows) {
    *group++ = std::sqrt(add_squares(usage + first, std::min(rows, n_neurons - first), 0.0f));
  }
}

void add_usage(const float* usage, int64_t n, float weight, float* joint) noexcept {
  for (int64_t i = 0; i < n; ++i) joint[i] += weight * usage[i];
}

Votes votes_of(const float* weight, const float* scale, int64_t batch) noexcept {
  Votes votes{.none = true, .all = false};
  for (int64_t b = 0; b < batch; ++b) {
    if (weight[b] == 0.0f) continue;
    votes.none = false;
    votes.all = votes.all || !std::isfinite(scale[b]);
  }
  return votes;
}

float threshold_of(Votes votes, float threshold) noexcept {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  return votes.none ? kInfinity : votes.all ? -kInfinity : threshold;
}

}  // namespace csfast
