#include "common/device.cuh"

#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "csfast/types.h"

namespace csfast::cuda {

bool available() {
  int count = 0;
  const bool found = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
  if (!found) static_cast<void>(cudaGetLastError());  // or the next launch would report it
  return found;
}

int current_device(const char* op) {
  int device = 0;
  check(cudaGetDevice(&device), op, "chip", "cudaGetDevice");
  return device;
}

int device_count(const char* op) {
  int count = 0;
  check(cudaGetDeviceCount(&count), op, "chip", "cudaGetDeviceCount");
  return count;
}

int attribute_of(const char* op, cudaDeviceAttr attribute, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), op, "chip", "cudaDeviceGetAttribute");
  return value;
}

const Chip& chip(const char* op) {
  static const std::vector<Chip> chips = of_devices<Chip>(op, [](auto ask) {
    return Chip{.capability = 10 * ask(cudaDevAttrComputeCapabilityMajor) +
                              ask(cudaDevAttrComputeCapabilityMinor),
                .n_processors = ask(cudaDevAttrMultiProcessorCount),
                .shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  });
  return chips[static_cast<size_t>(current_device(op))];
}

OnDevice::OnDevice(const char* op, const void* address) : before_(current_device(op)) {
  cudaPointerAttributes attributes{};
  check(cudaPointerGetAttributes(&attributes, address), op, "chip", "cudaPointerGetAttributes");
  there_ = attributes.device;
  if (there_ != before_) check(cudaSetDevice(there_), op, "chip", "cudaSetDevice");
}

OnDevice::~OnDevice() {
  // It was the current one before, so that this cannot fail.
  if (there_ != before_) static_cast<void>(cudaSetDevice(before_));
}

}  // namespace csfast::cuda
