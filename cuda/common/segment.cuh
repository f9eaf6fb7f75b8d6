// Lists in pieces: what each block of select keeps of its own run of tiles, at a fixed place.
//
// One after the other the pieces are the whole list, ascending; so no atomic decides an order, and
// whoever wants the list needs only add up the counts of the pieces before.
#pragma once

#include <cstdint>

#include "csfast/tile.h"

namespace csfast::cuda {

inline constexpr int kBlocksMax = 160;  // of select and execute for one row: workspaces have room
inline constexpr int kTaskNeurons = 8;  // that a warp senses at once: rows of a tensor product

// The tiles of a row in runs, one a block, of whole units: of 8 neurons or more, so that runs begin
// where warps do.
struct Runs {
  int64_t n_tiles;
  int64_t n_units;
  int unit;  // tiles
  int blocks;

  static constexpr int unit_of(int tile_rows) {
    return tile_rows < kTaskNeurons ? (kTaskNeurons + tile_rows - 1) / tile_rows : 1;
  }
  static constexpr Runs of(int64_t n_neurons, int tile_rows, int blocks) {
    const int64_t n_tiles = n_tiles_max(n_neurons, tile_rows);
    const int unit = unit_of(tile_rows);
    return {
        .n_tiles = n_tiles, .n_units = (n_tiles + unit - 1) / unit, .unit = unit, .blocks = blocks};
  }

  // The first tile of block i's run; of i = blocks, the end of the last one's.
  constexpr int64_t begin(int64_t i) const {
    const int64_t tile = n_units * i / blocks * unit;
    return tile < n_tiles ? tile : n_tiles;
  }
  // Of any run, at most.
  constexpr int64_t tiles_max() const { return (n_units + blocks - 1) / blocks * unit; }
};

// Where the pieces of the lists are.
struct Segments {
  int32_t* tile;   // (lists, n_tiles_max): piece i begins at its run's first tile
  int32_t* count;  // (lists, blocks): tiles of each piece
  int blocks;      // 0: there are none
};

}  // namespace csfast::cuda
