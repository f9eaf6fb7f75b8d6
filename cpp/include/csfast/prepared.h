// Prepared: the launches of a call on CUDA, made out once before many calls of it.
//
// Everything is fixed but where x and out are: which kernels, on what grid, with which parameters
// and how much shared memory. A run asks nothing, chooses nothing and allocates nothing.
#pragma once

#include <cstddef>
#include <memory>
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

// A Prepared made a graph of, on the device that is current then: one launch, which costs the host
// less than those of its kernels. Calls must not overlap.
class Replay {
 public:
  explicit Replay(Prepared prepared);
  Replay(Replay&&) noexcept;
  ~Replay();

  // The same as the other. A stream under capture is given the kernels.
  void run(const void* x, void* out, Stream stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace cuda

}  // namespace csfast
