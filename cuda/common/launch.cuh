// The one way to launch a kernel: checked, and named if it fails.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "csfast/design.h"
#include "csfast/types.h"

namespace csfast::cuda {

inline void check(cudaError_t status, const char* op, const char* kernel, const char* call) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // or someone else's next check would report it again
  throw BackendError(std::string("[") + op + "] kernel " + kernel + ": " + call + " failed: " +
                     cudaGetErrorName(status) + " (" + cudaGetErrorString(status) + ").");
}

// Whether CSFAST_SYNC=1 was set when the process first launched a kernel.
inline bool synchronous() {
  static const bool asked = [] {
    const char* value = std::getenv("CSFAST_SYNC");
    return value != nullptr && std::string_view(value) == "1";
  }();
  return asked;
}

inline constexpr int kSharedUnasked = 48 << 10;  // bytes that a block has without asking

// What a launch has beside its grid.
struct Launch {
  int shared_bytes = 0;   // of dynamic_shared()
  bool overlaps = false;  // may begin before the kernel before it has ended, see async.cuh
};

// Every launch goes through here, so no launch goes unchecked. With CSFAST_SYNC=1 it waits for the
// kernel, so that a fault names it; a stream under capture runs nothing and is not waited for.
template <typename Params>
void launch(const char* op, const char* name, void (*kernel)(Params), dim3 grid, dim3 block,
            Stream stream, const Params& params, const Launch& more = {}) {
  if (more.shared_bytes > kSharedUnasked) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               more.shared_bytes),
          op, name, "cudaFuncSetAttribute");
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(more.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = more.overlaps ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, params), op, name, "launch");
  if (!synchronous()) return;

  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(config.stream, &capture), op, name, "cudaStreamIsCapturing");
  if (capture != cudaStreamCaptureStatusNone) return;
  check(cudaStreamSynchronize(config.stream), op, name, "run");
}

// The machine that the next launch goes to.
inline Chip chip(const char* op) {
  int device = 0;
  check(cudaGetDevice(&device), op, "chip", "cudaGetDevice");
  const auto of = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), op, "chip", "cudaDeviceGetAttribute");
    return value;
  };
  return {.capability =
              10 * of(cudaDevAttrComputeCapabilityMajor) + of(cudaDevAttrComputeCapabilityMinor),
          .n_processors = of(cudaDevAttrMultiProcessorCount),
          .shared_bytes = of(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

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
