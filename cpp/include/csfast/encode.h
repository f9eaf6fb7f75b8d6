// Encode: a matrix to trellis codes, column by column with error feedback.
//
//   target[r] = w[r, c] / step[r],  value[:, c] = path of least sum_r step[r]^2 (target - value)^2
//   w[:, j] -= (w[:, c] - step * value[:, c]) / feedback[c, c] * feedback[c, j]      j > c
//
// The code, its table and the layout are those of trellis.h. `feedback` is the upper Cholesky
// factor of the inverse second moment of the inputs, so that what a column's codes leave undone
// moves the columns after it. A path is chosen by Viterbi over the rows of a lane; ties go to the
// state whose oldest bit is 0, the lower index, the lower last state. A row of step 0 stands for
// zeros.
//
// Sums in float32, in an order that depends on the sizes alone: codes depend neither on the number
// of threads nor, on the CPU, on the instruction set.
#pragma once

#include <cstdint>

#include "csfast/trellis.h"
#include "csfast/types.h"

namespace csfast {

struct EncodeParams {
  const float* w;         // (rows, cols), finite
  const float* feedback;  // (cols, cols), upper triangular, its diagonal positive
  const float* step;      // (rows), not negative
  const int8_t* table;    // (2^(bits + 1)), rising
  uint8_t* codes;         // (row_tiles, col_tiles, bits, 64), written
  int8_t* value;          // (rows, cols), written
  void* workspace;        // encode_workspace() bytes, 256-byte aligned on CUDA, content irrelevant
  int64_t rows, cols;
  int bits;  // 1 .. kTrellisBitsMax
  int nu;    // 3 .. kTrellisMemoryMax
};

// Bytes of workspace that encode wants on `device`.
int64_t encode_workspace(int64_t rows, int64_t cols, Device device);

// Throws std::invalid_argument if the sizes make no sense, BackendError if the device fails.
// Asynchronous on CUDA.
void encode(const EncodeParams& p, Device device, Stream stream);

namespace cuda {
int64_t encode_workspace(int64_t rows, int64_t cols);
void encode(const EncodeParams& p, Stream stream);
}  // namespace cuda

}  // namespace csfast
