// What select's choice and its kernels both know: how much a block takes, of what, and where.
#pragma once

#include <cstdint>

#include "common/sizes.h"
#include "csfast/planes.h"

namespace csfast::cuda {

inline constexpr int kSenseThreads = 512;  // a block, one on a processor: 128 registers a thread
inline constexpr int kSenseWarps = kSenseThreads / kWarp;
inline constexpr int kSenseBatch = 16;           // rows of the batch, at most
inline constexpr int kProductColumns = 8;        // of these, in one product
inline constexpr int kPrefetchBytes = 96 << 10;  // of codes, while the kernel before ends
inline constexpr int64_t kSenseWidth = 1 << 18;  // channels, what sums of products allow
inline constexpr int kOwnRows =
    4;  // that every block quantises itself: .2 us each, a launch is 2 us

// Channels of one activation in shared memory, zero beyond d: whole units of planes, whole bytes of
// ternary codes.
constexpr int64_t shared_channels(Code code, int64_t d) {
  if (code == Code::kTernary) return kTrits * row_bytes(d, code);
  return (chunks_of(d) + 1) / 2 * 2 * kChunk;
}

// Bytes from one activation in shared memory to the next: an odd multiple of 64, so that the two
// rows of the batch that a quarter of a warp reads are in different banks; and 64 at least beyond
// the channels, as far as lanes without codes may read.
constexpr int64_t shared_stride(Code code, int64_t d) {
  return (shared_channels(code, d) + 127) / 128 * 128 + 64;
}

// Of dynamic shared memory of a block that senses a run: activations, the two scales of a neuron of
// the run, usages.
constexpr int64_t run_bytes(Code code, int64_t batch, int64_t d, int64_t run_neurons) {
  return batch * shared_stride(code, d) + run_neurons * 2 * int64_t{sizeof(float)} +
         batch * run_neurons * int64_t{sizeof(float)};
}
inline constexpr int kRunSharedBytes = 352;  // of its static shared memory, RunShared

}  // namespace csfast::cuda
