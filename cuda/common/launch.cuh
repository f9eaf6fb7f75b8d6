// The one way to launch a kernel: checked, and named if it fails.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "csfast/prepared.h"
#include "csfast/types.h"

namespace csfast::cuda {

inline void check(cudaError_t status, const char* op, const char* kernel, const char* call) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // or someone else's next check would report it again
  throw BackendError(std::string("[") + op + "] kernel " + kernel + ": " + call + " failed: " +
                     cudaGetErrorName(status) + " (" + cudaGetErrorString(status) + ").");
}

inline constexpr int kSharedUnasked = 48 << 10;  // bytes that a block has without asking
inline constexpr size_t kParamsMax = 4 << 10;    // bytes that a kernel may be given

// Where launches go: to a stream at once, or into a Prepared, for runs to come.
struct Queue {
  Stream stream = nullptr;
  Prepared* prepared = nullptr;

  Queue(Stream on) : stream(on) {}
  explicit Queue(Prepared& into) : prepared(&into) {}

  // `params` are copied.
  void put(const Step& step, const void* params, size_t bytes) const;
};

// What a launch has beside its grid.
struct Launch {
  int shared_bytes = 0;   // of dynamic_shared()
  bool overlaps = false;  // may begin before the kernel before it has ended, see async.cuh
  // The fields of its parameters that are addresses in x and in out, if it has such: where these
  // are not known yet, the caller counts from null.
  const void* const* x = nullptr;
  void* const* out = nullptr;
};

// Every launch goes through here, so no launch goes unchecked. With CSFAST_SYNC=1 it waits for the
// kernel, so that a fault names it; a stream under capture runs nothing and is not waited for.
template <typename Params>
void launch(const char* op, const char* name, void (*kernel)(Params), dim3 grid, dim3 block,
            const Queue& queue, const Params& params, const Launch& more = {}) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= kParamsMax);
  const auto place_of = [&](const void* field) {
    if (field == nullptr) return -1;
    return static_cast<int>(static_cast<const char*>(field) -
                            reinterpret_cast<const char*>(&params));
  };
  queue.put({.op = op,
             .name = name,
             .kernel = reinterpret_cast<const void*>(kernel),
             .grid = {grid.x, grid.y, grid.z},
             .threads = block.x,
             .shared_bytes = more.shared_bytes,
             .overlaps = more.overlaps,
             .x_at = place_of(more.x),
             .out_at = place_of(more.out)},
            &params, sizeof(Params));
}

// What the rest is made of. Whether CSFAST_SYNC=1 was set when a process first launched a kernel;
bool is_synchronous();
// one launch, of parameters where they are;
void launch_step(const Step& step, void* params, Stream stream);
// and parameters of a part at `to`, with the addresses of x and out in them.
void copy_params(const Prepared& prepared, const Prepared::Part& part, const void* x, void* out,
                 std::byte* to);

inline bool is_aligned(const void* address, int bytes = 16) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<unsigned>(bytes) == 0;
}

// For the arrays that kernels read several elements at a time, whatever the sizes.
inline void want_aligned(const void* address, int bytes, const char* op, const char* array) {
  if (is_aligned(address, bytes)) return;
  const auto past = reinterpret_cast<uintptr_t>(address) % static_cast<unsigned>(bytes);
  throw std::invalid_argument(std::string("[") + op + "] " + array + " begins " +
                              std::to_string(past) + " bytes past a multiple of " +
                              std::to_string(bytes) + ": want an address that is one.");
}

// Blocks of `size` that hold `n`. A grid counts in unsigned.
constexpr unsigned blocks_of(int64_t n, int64_t size) {
  return static_cast<unsigned>((n + size - 1) / size);
}

}  // namespace csfast::cuda
