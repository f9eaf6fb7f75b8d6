// Design: how the CUDA kernels go about an operation. Asked for, chosen, printed.
//
// What a design changes in a result is the order of its sums: see Path. Nothing here is of account
// on the CPU.
#pragma once

#include <cstdint>
#include <string>

namespace csfast {

// Sums have the same order, bit for bit, in all designs of one path and number of blocks.
enum class Path : uint8_t {
  kAuto,     // the fastest that fits
  kGeneral,  // any element type, width and alignment
  kList,     // each block takes an equal share of the list
  kRange,  // each block takes what is listed of a range of neurons, which ffn lets it sense itself
  kBatch,  // tensor cores, for rows that share a list
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
  int blocks = 0;         // of kList and kRange; 0: as many as fit the machine
  bool portable = false;  // only what capability 8.0 has: no bulk copies, no programmatic launches
};

// The machine, as far as a choice depends on it.
struct Chip {
  int capability;    // 10 * major + minor
  int n_processors;  // streaming multiprocessors
  int shared_bytes;  // of shared memory that a block may have
};

}  // namespace csfast
