// The dot product of two rows in float32, in an order that depends on their length alone.
#pragma once

#include <cstdint>

#include "isa/base/number.h"

namespace csfast::base {

inline constexpr int kLanes =
    16;  // independent sums: enough to fill the vector units of any baseline

template <typename T>
float dot(const T* w, const T* x, int64_t d) {
  float lane[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) {
    for (int i = 0; i < kLanes; ++i) lane[i] += to_float(w[c + i]) * to_float(x[c + i]);
  }
  for (int i = 0; c + i < d; ++i) lane[i] += to_float(w[c + i]) * to_float(x[c + i]);
  float total = 0.0f;
  for (const float v : lane) total += v;
  return total;
}

}  // namespace csfast::base
