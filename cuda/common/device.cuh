// What there is of devices, asked once in the life of a process, as it does not change.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "csfast/design.h"

namespace csfast::cuda {

// The number of the device that the next launch goes to.
int current_device(const char* op);

int device_count(const char* op);
int attribute_of(const char* op, cudaDeviceAttr attribute, int device);

// What read(ask) makes of the attributes ask(which) of every device, by its number.
template <typename Of, typename Read>
std::vector<Of> of_devices(const char* op, Read read) {
  std::vector<Of> all;
  for (int device = 0; device < device_count(op); ++device) {
    all.push_back(read([&](cudaDeviceAttr which) { return attribute_of(op, which, device); }));
  }
  return all;
}

// The machine that the next launch goes to.
const Chip& chip(const char* op);

// Makes the device on which `address` lies the current one, as long as this lives.
class OnDevice {
 public:
  OnDevice(const char* op, const void* address);
  OnDevice(const OnDevice&) = delete;
  ~OnDevice();

 private:
  int before_, there_;
};

}  // namespace csfast::cuda
