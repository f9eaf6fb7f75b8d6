#include "csfast/recover.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "check.h"
#include "loops.h"

namespace csfast {
namespace {

void check(const RecoverParams& p, Device device) {
  check_neurons("recover", p.batch, p.n_neurons);
  if (p.rule != Rule::kTopK || device != Device::kCpu) return;
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.budget[b] < 0 || p.budget[b] > p.n_neurons) {
      throw std::invalid_argument("[recover] budget[" + std::to_string(b) +
                                  "] = " + std::to_string(p.budget[b]) +
                                  ": want 0 to n_neurons = " + std::to_string(p.n_neurons) + ".");
    }
  }
}

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

int32_t keep_top(const float* usage, int64_t n, int64_t budget, int32_t* index, float* missed) {
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

void recover_row(const RecoverParams& p, int64_t b) {
  const Loops& loop = loops();
  const int32_t* y = p.y + b * 2 * p.n_neurons;  // (n_neurons, 2)
  float* usage = p.usage + b * p.n_neurons;      // (n_neurons)
  int32_t* index = p.index + b * p.n_neurons;    // (n_neurons)
  const bool all = !std::isfinite(p.scale[b]);
  const float threshold = p.rule == Rule::kThreshold && !all
                              ? p.threshold[b]
                              : -std::numeric_limits<float>::infinity();  // keeps every neuron
  int32_t count = 0;
  float missed = 0.0f;
  for (int64_t first = 0; first < p.n_neurons; first += kBlock) {
    Kept kept = loop.keep(y + 2 * first, p.scale[b], p.row_scale + 2 * first,
                          std::min(kBlock, p.n_neurons - first), threshold, usage + first);
    missed += kept.missed;
    for (; kept.mask != 0; kept.mask &= kept.mask - 1) {
      index[count++] = static_cast<int32_t>(first + std::countr_zero(kept.mask));
    }
  }
  if (p.rule == Rule::kTopK && !all)
    count = keep_top(usage, p.n_neurons, p.budget[b], index, &missed);
  p.count[b] = count;
  p.missed[b] = missed;
}

}  // namespace

void recover(const RecoverParams& p, Device device, Stream stream) {
  check(p, device);
  if (p.batch == 0) return;
  if (device == Device::kCuda) return cuda::recover(p, stream);
  for (int64_t b = 0; b < p.batch; ++b) recover_row(p, b);
}

}  // namespace csfast
