// Sketch: linear maps by their few-bit codes, on inputs that are rotated and rounded to int8.
//
//   z[b] = blocks of Hadamard(scale * x[b, perm]),  q[b] = round(z[b] * 127 / max |z[b]|)
//   n_l[b, r] = sum_c value_l[r, c] q[b, c]                                l < n_levels
//   y[b, r] = sum_l n_l[b, r] step_l[r] * (max |z[b]| / 127 / sqrt(block))
//
// The codes and their layout are those of trellis.h with memory 8, the values those of
// trellis_value; the rotation is that of python/csfast/codes/rotation.py, sums and differences of
// strides 1, 2, 4, ... in float32. n is an exact integer, whatever parts it is added up in; each
// product with a step is rounded, then the sum of levels in order, then the product with the scale.
// So y depends neither on the instruction set, nor on threads, nor on the rest of the batch, and is
// the same on CUDA.
//
// An x that is not finite makes its whole row of y not-a-number.
#pragma once

#include <cstdint>

#include "csfast/trellis.h"
#include "csfast/types.h"

namespace csfast {

inline constexpr int kSketchLevelsMax = 4;
inline constexpr int64_t kSketchBatchMax = 65535;   // a grid dimension of CUDA
inline constexpr int64_t kSketchColsMax = 1 << 16;  // of a word of a rotation
inline constexpr int kRotationBlockMax = 128;

// The channels that are rotated together.
constexpr int64_t rotation_block_of(int64_t cols) {
  const int64_t power = cols & -cols;
  return power < kRotationBlockMax ? power : kRotationBlockMax;
}

// One over the root of a block.
constexpr float rotation_norm_of(int64_t block) {
  float norm = 1.0f;
  for (; block >= 4; block /= 4) norm *= 0.5f;
  return block == 2 ? norm * 0x1.6a09e6p-1f : norm;
}

// The row of q, padded with zeros to whole tiles and to lines of 64 bytes, and a line that begins
// with the sum of the row, an int32, on the CPU: what a code is off by is taken off by it.
constexpr int64_t sketch_sum_at(int64_t cols) {
  return (cols + 63) / 64 * 64;
}
constexpr int64_t sketch_width(int64_t cols) {
  return sketch_sum_at(cols) + 64;
}

// A word of a rotation: below the channel that stands at a place, of a permutation; above what it
// is multiplied by, as bfloat16.
constexpr uint32_t turned_channel(uint32_t word) {
  return word & 0xffffu;
}
constexpr uint32_t turned_scale(uint32_t word) {  // the bits of a float
  return word & 0xffff0000u;
}

struct SketchLevel {
  const uint8_t* codes;  // (row_tiles, col_tiles, bits, 64)
  const uint16_t* step;  // (rows), bfloat16
  int bits;              // 1 .. kTrellisBitsMax
};

struct SketchParams {
  SketchLevel level[kSketchLevelsMax];
  const uint32_t* turn;  // (cols), see turned_channel and turned_scale
  const void* x;         // (batch, cols), T
  float* z;              // (batch, cols), scratch
  int8_t* q;             // (batch, sketch_width), scratch
  float* scale;          // (batch), scratch
  float* y;              // (batch, rows), written
  int64_t batch, rows, cols;
  int n_levels;  // 1 .. kSketchLevelsMax
  DType dtype;   // T
};

// Throws std::invalid_argument if the sizes make no sense, BackendError if the device fails.
// Asynchronous on CUDA.
void sketch(const SketchParams& p, Device device, Stream stream);

// The two halves of it on the CPU, for callers with threads of their own: neither checks anything
// or starts a thread. First x goes into q, then any thread makes any row tiles of y.
void sketch_prepare(const SketchParams& p);
void sketch_tiles(const SketchParams& p, int64_t first, int64_t last);

namespace cuda {
void sketch(const SketchParams& p, Stream stream);
}

}  // namespace csfast
