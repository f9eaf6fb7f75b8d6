// Project: linear measurements of an activation by the rows of a dense matrix.
//
//   y[b, i] = sum_j phi[i, j] * x[b, j]      i < rows
//
// Sums in float32. The order of summation depends on d alone, so a measurement depends neither on
// the number of threads, nor on the rest of the batch, nor on how many rows are measured: fewer are
// a prefix.
#pragma once

#include <cstdint>

#include "csfast/types.h"

namespace csfast {

struct ProjectParams {
  const void* phi;  // (m, d), T
  const void* x;    // (batch, d), T
  float* y;         // (batch, rows), written
  int64_t batch, d, m;
  int64_t rows;  // of phi that measure, the first: 1 .. m
  DType dtype;   // T
};

// Throws std::invalid_argument if the sizes make no sense, BackendError if the device fails.
// Asynchronous on CUDA.
void project(const ProjectParams& p, Device device, Stream stream);

namespace cuda {
void project(const ProjectParams& p, Stream stream);
}

}  // namespace csfast
