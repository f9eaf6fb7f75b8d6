#include "groups.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace csfast {
namespace {

// Usages are never negative, so their bits rank them; not-a-number ranks with infinity, on top.
uint32_t rank(float usage) {
  return std::bit_cast<uint32_t>(usage == usage ? usage : std::numeric_limits<float>::infinity());
}

// The largest rank that at least `budget` >= 1 usages reach, found digit by digit.
uint32_t rank_of(const float* usage, int64_t n, int64_t budget) {
  constexpr int kDigit = 8;
  uint32_t prefix = 0;
  for (int shift = 32 - kDigit; shift >= 0; shift -= kDigit) {
    int64_t seen[1 << kDigit] = {};
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t r = rank(usage[i]);
      if (shift + kDigit == 32 || r >> (shift + kDigit) == prefix) {
        ++seen[r >> shift & ((1u << kDigit) - 1)];
      }
    }
    uint32_t digit = (1u << kDigit) - 1;
    for (; seen[digit] < budget; --digit) budget -= seen[digit];
    prefix = prefix << kDigit | digit;
  }
  return prefix;
}

}  // namespace

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

int32_t keep_top(const float* usage, int64_t n, int64_t budget, int32_t* index,
                 float* missed) noexcept {
  const uint32_t last = budget > 0 ? rank_of(usage, n, budget) : 0;
  int64_t ties = budget;  // room for usages that are exactly the last one kept
  for (int64_t i = 0; i < n && ties > 0; ++i) ties -= rank(usage[i]) > last;
  int32_t count = 0;
  *missed = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t r = rank(usage[i]);
    if (budget > 0 && (r > last || (r == last && ties-- > 0))) {
      index[count++] = static_cast<int32_t>(i);
    } else {
      *missed += usage[i] * usage[i];
    }
  }
  return count;
}

}  // namespace csfast
