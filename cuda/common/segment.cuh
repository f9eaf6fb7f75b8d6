// Lists in pieces: what each block of select keeps of its own run of tiles, at a fixed place.
//
// One after the other the pieces are the whole list, ascending; so no atomic decides an order, and
// whoever wants the list needs only add up the counts of the pieces before.
#pragma once

#include <cstdint>

#include "csfast/design.h"

namespace csfast::cuda {

// Where the pieces of the lists are.
struct Segments {
  int32_t* tile;   // (lists, n_tiles_max): piece i begins at its run's first tile
  int32_t* count;  // (lists, blocks): tiles of each piece
  int blocks;      // 0: there are none
};

}  // namespace csfast::cuda
