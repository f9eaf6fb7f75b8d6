// Prepared: the launches of a call on CUDA, made out once before many calls of it.
//
// Everything is fixed but where x and out are: which kernels, on what grid, with which parameters
// and how much shared memory. A run asks nothing, chooses nothing and allocates nothing.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "csfast/types.h"

namespace csfast {

// One launch.
struct Step {
  const char* op;  // for messages
  const char* name;
  const void* kernel;
  unsigned grid[3];
  unsigned threads;  // of a block
  int shared_bytes;  // dynamic, of a block
  bool overlaps;     // may begin before the kernel before it has ended
  int x_at;          // where in its parameters an address in x stands, or -1
  int out_at;        // likewise in out
};

struct Prepared {
  struct Part {
    Step step;
    size_t begin, bytes;  // of its parameters; addresses in x and out count from these
  };
  std::vector<Part> parts;
  std::vector<std::byte> params;
};

// For example "range 132 x 512 with 19032 bytes, sum 28 x 256".
std::string to_string(const Prepared& prepared);

namespace cuda {
// Throws BackendError if the device fails. Asynchronous. x is a multiple of 16 bytes.
void run(const Prepared& prepared, const void* x, void* out, Stream stream);
}  // namespace cuda

}  // namespace csfast
