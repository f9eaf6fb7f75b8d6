#include "csfast/recover.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>

#include "check.h"
#include "groups.h"
#include "loops.h"

namespace csfast {
namespace {

void check(const RecoverParams& p, Device device) {
  check_neurons("recover", p.batch, p.n_neurons);
  check_group_rows("recover", "group_rows", p.group_rows);
  if (p.columns != 1 && p.columns != 2) {
    throw std::invalid_argument("[recover] y of " + std::to_string(p.columns) +
                                " columns: want 1, or 2 for gate and up.");
  }
  if (device != Device::kCpu) return;
  if (p.votes != nullptr) check_weights("recover", p.votes, p.batch);
  if (p.rule != Rule::kTopK) return;
  const int64_t n = n_groups(p.n_neurons, p.group_rows);
  for (int64_t b = 0; b < (p.votes == nullptr ? p.batch : 1); ++b) {
    if (p.budget[b] < 0 || p.budget[b] > n) {
      throw std::invalid_argument("[recover] budget[" + std::to_string(b) +
                                  "] = " + std::to_string(p.budget[b]) + ": want 0 to " +
                                  (p.group_rows == 1 ? "n_neurons = " : "n_groups = ") +
                                  std::to_string(n) + ".");
    }
  }
}

// Calls f(first, n, usage) with the usage (n) of n <= kBlock groups at a time of row b.
template <typename F>
void for_groups(const RecoverParams& p, int64_t b, F&& f) {
  const Loops& loop = loops();
  const char* y = p.y != nullptr ? reinterpret_cast<const char*>(p.y)
                                 : reinterpret_cast<const char*>(p.y_float);
  float usage[kBlock];
  float group[kBlock];
  const auto neurons = [&](int64_t first, int64_t n) {
    const int64_t at = first * p.columns;
    loop.usage({.y = y + (b * p.n_neurons * p.columns + at) * 4,
                .row_scale = p.row_scale + at,
                .offset = p.offset == nullptr ? nullptr : p.offset + at,
                .scale = p.scale[b],
                .columns = p.columns,
                .is_float = p.y == nullptr,
                .activation = p.activation},
               n, usage);
  };
  // As many whole groups as a block holds, but one at least.
  const int64_t step = std::max(int64_t{1}, kBlock / p.group_rows) * p.group_rows;
  for (int64_t first = 0; first < p.n_neurons; first += step) {
    const int64_t n = std::min(step, p.n_neurons - first);
    if (p.group_rows > kBlock) {
      float sum = 0.0f;
      for (int64_t i = 0; i < n; i += kBlock) {
        neurons(first + i, std::min(kBlock, n - i));
        sum = add_squares(usage, std::min(kBlock, n - i), sum);
      }
      group[0] = std::sqrt(sum);
      f(first / p.group_rows, 1, group);
      continue;
    }
    neurons(first, n);
    if (p.group_rows > 1) group_usage(usage, n, p.group_rows, group);
    f(first / p.group_rows, n_groups(n, p.group_rows), p.group_rows > 1 ? group : usage);
  }
}

// The decision of one list on its usage.
void decide(const RecoverParams& p, Votes votes, int64_t list) {
  const Loops& loop = loops();
  const int64_t n = n_groups(p.n_neurons, p.group_rows);
  const float* usage = p.usage + list * n;
  int32_t* index = p.index + list * n;
  if (p.rule == Rule::kTopK && !votes.all && !votes.none) {
    p.count[list] = keep_top(usage, n, p.budget[list], index, p.missed + list);
    return;
  }
  const float limit = p.rule == Rule::kThreshold ? p.threshold[list] : 0.0f;
  int32_t count = 0;
  float missed = 0.0f;
  for (int64_t first = 0; first < n; first += kBlock) {
    Kept kept = loop.keep(usage + first, std::min(kBlock, n - first), threshold_of(votes, limit));
    missed += kept.missed;
    for (; kept.mask != 0; kept.mask &= kept.mask - 1) {
      index[count++] = static_cast<int32_t>(first + std::countr_zero(kept.mask));
    }
  }
  p.count[list] = count;
  p.missed[list] = missed;
}

void recover_on_cpu(const RecoverParams& p) {
  const int64_t n = n_groups(p.n_neurons, p.group_rows);
  if (p.votes != nullptr) {
    std::fill(p.usage, p.usage + n, 0.0f);
    for (int64_t b = 0; b < p.batch; ++b) {
      if (p.votes[b] == 0.0f) continue;
      for_groups(p, b, [&](int64_t first, int64_t size, const float* usage) {
        add_usage(usage, size, p.votes[b], p.usage + first);
      });
    }
    return decide(p, votes_of(p.votes, p.scale, p.batch), 0);
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    for_groups(p, b, [&](int64_t first, int64_t size, const float* usage) {
      std::copy(usage, usage + size, p.usage + b * n + first);
    });
    decide(p, {.none = false, .all = !std::isfinite(p.scale[b])}, b);
  }
}

}  // namespace

void recover(const RecoverParams& p, Device device, Stream stream) {
  check(p, device);
  if (p.batch == 0 && p.votes == nullptr) return;
  device == Device::kCuda ? cuda::recover(p, stream) : recover_on_cpu(p);
}

}  // namespace csfast
