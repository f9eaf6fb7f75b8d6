// Read: all bytes of a few buffers, once, and nothing else. What reads parts of the same buffers is
// measured by it: nothing reads memory faster.
//
//   sum = sum_i word[i] mod 2^32      over all words of 32 bits, in any order
#pragma once

#include <cstdint>

#include "csfast/types.h"

namespace csfast {

struct Span {
  const void* data;  // at a multiple of 16 bytes
  int64_t bytes;     // a multiple of 16, below 64 GiB
};

constexpr int kMaxSpans = 240;  // of one call: CUDA takes them as an argument of its kernel

struct ReadParams {
  const Span* span;  // (n_spans), in memory of the host
  int n_spans;
  uint32_t* sum;  // (read_sums()), written: parts of the sum, those of the blocks that share it
};

// Parts of the sum on the device that is current: 1 on the CPU.
int64_t read_sums(Device device);

// Throws std::invalid_argument if there are too many spans or one is not of whole 16 bytes,
// BackendError if the device fails. Asynchronous on CUDA.
void read(const ReadParams& p, Device device, Stream stream);

namespace cuda {
int64_t read_sums();
void read(const ReadParams& p, Stream stream);
}  // namespace cuda

}  // namespace csfast
