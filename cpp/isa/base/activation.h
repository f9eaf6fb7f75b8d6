// What a gate goes through, on one float.
#pragma once

#include <cmath>

#include "csfast/types.h"

namespace csfast::base {

// 0.5 (1 + tanh(t)) is 1 / (1 + exp(-2 t)), so gelu_tanh(z) = z / (1 + exp(-z (c1 + c3 z^2))) with
// c1 = 2 sqrt(2/pi) and c3 = 0.044715 c1: right to a few ulp where 1 + tanh cancels.
inline constexpr float kGeluC1 = 1.5957691216057308f;
inline constexpr float kGeluC3 = 0.07135481627260025f;

inline float activate(Activation activation, float z) {
  const float w = activation == Activation::kSilu ? z : z * (kGeluC1 + kGeluC3 * (z * z));
  return z / (1.0f + std::exp(-w));
}

}  // namespace csfast::base
