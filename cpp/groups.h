// Usage of groups, and of a batch that decides together: recover.h. One version for every
// instruction set, so that recover and select agree on every bit.
#pragma once

#include <cstdint>

namespace csfast {

// sum + the squares of usage (n), added in order.
float add_squares(const float* usage, int64_t n, float sum) noexcept;

// group (n_groups) = the usages of groups of `rows` neurons, the last perhaps shorter, from
// usage (n_neurons).
void group_usage(const float* usage, int64_t n_neurons, int64_t rows, float* group) noexcept;

// joint (n) += weight * usage (n).
void add_usage(const float* usage, int64_t n, float weight, float* joint) noexcept;

// What overrides a threshold or a budget.
struct Votes {
  bool none;  // no row votes: keep nothing
  bool all;   // the scale of a voting row is not finite: keep everything
};

// Of a batch that decides together.
Votes votes_of(const float* weight, const float* scale, int64_t batch) noexcept;

// The threshold that `votes` leaves of one.
float threshold_of(Votes votes, float threshold) noexcept;

// index (count) = the `budget` largest of usage (n), ascending: not-a-number ranks as infinity,
// ties go to the lower index. Returns how many; `missed` is the sum of the squares of the others.
int32_t keep_top(const float* usage, int64_t n, int64_t budget, int32_t* index,
                 float* missed) noexcept;

}  // namespace csfast
