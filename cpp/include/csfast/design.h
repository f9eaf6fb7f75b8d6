// Design: how the CUDA kernels go about an operation. Asked for, chosen, printed.
//
// What a design changes in a result is the order of its sums: see Path. Nothing here is of account
// on the CPU.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "csfast/tile.h"

namespace csfast {

// Sums have the same order, bit for bit, in all designs of one path and number of blocks.
enum class Path : uint8_t {
  kAuto,     // the fastest that fits
  kGeneral,  // any element type, width and alignment
  kList,     // each block takes an equal share of the list
  kRange,    // each block takes what is listed of a run of neurons, which ffn lets it sense itself
  kBatch,    // tensor cores, for rows that share a list
};

// How the rows of weights come to a block.
enum class Loads : uint8_t {
  kAuto,
  kRegister,  // ahead, straight to registers
  kBulk,      // into a ring in shared memory, copied by the machine; of capability 9.0
};

// What a caller may ask for. Benches and tests do.
struct Design {
  Path path = Path::kAuto;
  Loads loads = Loads::kAuto;
  int blocks = 0;         // of all but kGeneral; 0: as many as fit the machine
  bool portable = false;  // only what capability 8.0 has: no bulk copies, no programmatic launches
};

// From words, each at most once, in any order: general, list, range, batch; register, bulk;
// blocks=N; portable. None are the default. Throws std::invalid_argument for others.
Design parse_design(const char* op, std::string_view words);

// The machine, as far as a choice depends on it.
struct Chip {
  int capability;    // 10 * major + minor
  int n_processors;  // streaming multiprocessors
  int shared_bytes;  // of shared memory that a block may have
};

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
  // One block a processor, as far as there are units.
  static constexpr Runs on(const Chip& chip, int64_t n_neurons, int tile_rows) {
    const int64_t units = of(n_neurons, tile_rows, 1).n_units;
    const int most = chip.n_processors < kBlocksMax ? chip.n_processors : kBlocksMax;
    return of(n_neurons, tile_rows, static_cast<int>(units < most ? units : most));
  }

  // The first tile of block i's run; of i = blocks, the end of the last one's.
  constexpr int64_t begin(int64_t i) const {
    const int64_t tile = n_units * i / blocks * unit;
    return tile < n_tiles ? tile : n_tiles;
  }
  // Of any run, at most.
  constexpr int64_t tiles_max() const { return (n_units + blocks - 1) / blocks * unit; }
};

// What was chosen for execute.
struct Chosen {
  Path path;
  Loads loads;        // of all but kGeneral
  bool overlaps;      // programmatic launches
  int blocks;         // of kList and kRange, for one row of the batch; of kBatch, of activations
  int shares;         // of kBatch: of the list, for each 512 columns of the output
  int group_threads;  // of kList and kRange: threads that share a neuron, a power of two
  int vectors;        // likewise: loads of 16 bytes that a thread has of a row
  int list_room;      // of all but kGeneral: neurons of a block, at most
};

// For example "list bulk overlapping blocks=132 group_threads=512 vectors=1".
std::string to_string(const Chosen& chosen);

}  // namespace csfast
