// The trellis and what its search works in.
#pragma once

#include <cstdint>
#include <vector>

#include "csfast/trellis.h"

namespace csfast {

struct Trellis {
  Trellis(const int8_t* table, int bits, int nu);

  int bits, nu;
  float level[2 << kTrellisBitsMax];
  uint8_t subset[2 << kTrellisMemoryMax];  // by window, the newest input in bit 0
};

struct TrellisWork {
  TrellisWork(const Trellis& trellis, int64_t steps);

  std::vector<float> cost;      // (2, states, kLanes)
  std::vector<uint16_t> older;  // (steps, states): bit of a lane, whether its oldest bit was 1
  std::vector<uint8_t> best;    // (steps, 4, kLanes): the level of each subset
};

}  // namespace csfast
