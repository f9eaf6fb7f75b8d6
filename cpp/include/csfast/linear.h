// Linear: the linear maps of a model as it stands, for few rows at once.
//
//   y[b, r] = sum_c w[r, c] * x[b, c] + bias[r]      b < batch, r < rows
//
// w lies as torch holds it, so a model needs no second copy, and is read from memory once for up to
// kLinearBatch rows of the batch: that bounds it.
//
// Where w is bfloat16, x is rounded to bfloat16, half to even, and every product is exact. On the
// CPU sixteen lanes add up, lane i of each 32 channels the product of channel 2 i + 1 and then that
// of 2 i, rounding each time, which is what vdpbf16ps does; then lane i takes lane i + 8, then
// i + 4, i + 2 and i + 1, and last comes the bias. So all instruction sets give the same bits as
// long as nothing is below the normal numbers: AVX-512 takes what is for zero, the others do not.
//
// Where w is float32, lane i has channel i of each 16. AVX-512 and AVX2 round a product and its
// addition once, base twice.
//
// The order depends on cols alone: a row's bits depend neither on threads nor on the rest of the
// batch. CUDA adds in another order, which depends on cols alone, too.
#pragma once

#include <cstdint>

#include "csfast/types.h"

namespace csfast {

inline constexpr int64_t kLinearTile = 16;   // rows of w that one thread takes at once
inline constexpr int64_t kLinearBatch = 16;  // rows of the batch for which w is read once

constexpr int64_t linear_tiles_of(int64_t rows) {
  return (rows + kLinearTile - 1) / kLinearTile;
}

// A row of x as the loops want it, padded with zeros.
constexpr int64_t linear_width(int64_t cols) {
  return (cols + 31) / 32 * 32;
}

struct LinearParams {
  const void* w;     // (rows, cols), T
  const void* bias;  // (rows), T, or null
  const float* x;    // (batch, cols)
  float* work;       // (batch, linear_width), scratch; not read on CUDA
  float* y;          // (batch, rows), written
  int64_t batch, rows, cols;
  DType dtype;  // T: float32 or bfloat16
};

// Throws std::invalid_argument if the sizes make no sense, BackendError if the device fails.
// Asynchronous on CUDA.
void linear(const LinearParams& p, Device device, Stream stream);

// The two halves of it on the CPU, for callers with threads of their own: neither checks anything
// or starts a thread. First x goes into work, then any thread makes any tiles of y.
void linear_prepare(const LinearParams& p);
void linear_tiles(const LinearParams& p, int64_t first, int64_t last);

namespace cuda {
void linear(const LinearParams& p, Stream stream);
}

}  // namespace csfast
