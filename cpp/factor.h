// The factors of all exponents, as the loops look them up.
#pragma once

#include <cstdint>

#include "csfast/nested.h"

namespace csfast {

struct Factors {
  float of[256];  // by exponent
};

inline constexpr Factors kFactors = [] {
  Factors factors{};
  for (int e = 0; e < 256; ++e) factors.of[e] = factor_of(mantissa_of(e % kStepOctave), e);
  return factors;
}();

}  // namespace csfast
