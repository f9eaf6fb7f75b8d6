// What bench_ffn times, on the CPU and on CUDA, by the names that `csfast bench` gives it.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

#include "csfast/planes.h"

namespace csfast::bench {

inline constexpr Code kCode = Code::kBits2;

// A layer's sizes, and how many such layers rotate so that no cache holds them.
struct Shape {
  int64_t d, n_neurons;
  int layers;
};

struct Case {
  int64_t d, n_neurons;
  double density;      // fraction of the neurons that is executed
  int64_t batch = 1;   // rows; more than one share a support
  int block_rows = 1;  // neurons that are kept and read as one
};

inline constexpr Shape kCpuShape = {2048, 8192, 6};  // 600 MB
// 1.9 GB (of which select reads 280 MB), 12 GB and 12 GB, beside an L2 of 60 MB.
inline constexpr Shape kCudaShapes[] = {{896, 4864, 128}, {4096, 14336, 32}, {8192, 28672, 8}};
inline constexpr double kCudaDensities[] = {0.5, 0.25, 0.1};
inline constexpr int64_t kCudaBatches[] = {1, 4, 16};

// For example "ffn d=4096 F=14336 density=.25 batch=4 joint".
inline std::string name_of(const Case& c) {
  char density[16];
  std::snprintf(density, sizeof density, "%.2f", c.density);
  std::string name = "ffn d=" + std::to_string(c.d) + " F=" + std::to_string(c.n_neurons);
  name += std::string(" density=") + (density + (density[0] == '0' ? 1 : 0));
  if (c.block_rows > 1) name += " blocks=" + std::to_string(c.block_rows);
  if (c.batch > 1) name += " batch=" + std::to_string(c.batch) + " joint";
  return name;
}

// Bytes that a call has to read: codes, row scales, the equaliser and x (batch, d) ...
inline double select_bytes(const Case& c) {
  return static_cast<double>(c.n_neurons * (2 * row_bytes(c.d, kCode) + 2 * 4) + 4 * c.d +
                             2 * c.batch * c.d);
}

// ... and for `tiles` of the list their numbers, three rows of 16 bits a neuron, and x.
inline double execute_bytes(const Case& c, double tiles) {
  const int64_t tile = c.block_rows * 3 * 2 * c.d + 4;
  return tiles * static_cast<double>(tile) + static_cast<double>(2 * c.batch * c.d);
}

}  // namespace csfast::bench
