// The inner loops of the operations on the CPU, once per instruction set.
//
// A loop checks nothing, allocates nothing, throws nothing and starts no thread.
#pragma once

#include <cstdint>

#include "csfast/execute.h"
#include "csfast/planes.h"
#include "csfast/project.h"
#include "csfast/recover.h"
#include "csfast/sense.h"
#include "csfast/types.h"

namespace csfast {

inline constexpr int64_t kBlock = 64;  // neurons per call: one bit each in a mask

// What recovery by threshold says about one block of neurons.
struct Kept {
  uint64_t mask;  // bit i: neuron i of the block is kept
  float missed;   // sum of usage^2 over the others
};

struct Loops {
  const char* name;

  // One row of x (d) to q (q_width), see sense.h. Returns its scale.
  float (*quantize)(const void* x, const float* equal, int64_t d, DType dtype, int8_t* q) noexcept;

  // y[b * y_stride + r] of `rows` neighbouring rows of codes, r in [0, rows), and q (batch,
  // q_width).
  void (*measure)(const uint8_t* codes, int64_t rows, int64_t d, Code code, const int8_t* q,
                  int64_t batch, int32_t* y, int64_t y_stride) noexcept;

  // Measurements first .. first + n - 1 of every row of the batch, see project.h.
  void (*project)(const ProjectParams& p, int64_t first, int64_t n) noexcept;

  // usage (n) of n <= kBlock neurons from y (n, 2) and row_scale (n, 2), see recover.h.
  Kept (*keep)(const int32_t* y, float scale, const float* row_scale, int64_t n, float threshold,
               float* usage) noexcept;

  // sum (d) = the part of the output that `n` neurons contribute for the row x (d), see execute.h.
  void (*gather)(const ExecuteParams& p, const void* x, const int32_t* neuron, int64_t n,
                 bool first, float* sum) noexcept;

  // out (d) = the segments of sums (n_segments, d) added in order, rounded to T once.
  void (*finish)(const float* sums, int64_t n_segments, int64_t d, DType dtype, void* out) noexcept;
};

namespace base {
extern const Loops kLoops;
float quantize(const void* x, const float* equal, int64_t d, DType dtype, int8_t* q) noexcept;
void measure(const uint8_t* codes, int64_t rows, int64_t d, Code code, const int8_t* q,
             int64_t batch, int32_t* y, int64_t y_stride) noexcept;
void project(const ProjectParams& p, int64_t first, int64_t n) noexcept;
Kept keep(const int32_t* y, float scale, const float* row_scale, int64_t n, float threshold,
          float* usage) noexcept;
void gather(const ExecuteParams& p, const void* x, const int32_t* neuron, int64_t n, bool first,
            float* sum) noexcept;
void finish(const float* sums, int64_t n_segments, int64_t d, DType dtype, void* out) noexcept;
}  // namespace base

namespace avx2 {
// Null where the processor lacks one of AVX2, FMA and F16C.
const Loops* loops();
float quantize(const void* x, const float* equal, int64_t d, DType dtype, int8_t* q) noexcept;
void measure(const uint8_t* codes, int64_t rows, int64_t d, Code code, const int8_t* q,
             int64_t batch, int32_t* y, int64_t y_stride) noexcept;
void project(const ProjectParams& p, int64_t first, int64_t n) noexcept;
Kept keep(const int32_t* y, float scale, const float* row_scale, int64_t n, float threshold,
          float* usage) noexcept;
void gather(const ExecuteParams& p, const void* x, const int32_t* neuron, int64_t n, bool first,
            float* sum) noexcept;
void finish(const float* sums, int64_t n_segments, int64_t d, DType dtype, void* out) noexcept;
}  // namespace avx2

namespace avx512 {
// Null where the processor lacks one of AVX-512 F, BW, DQ, VL, VNNI and BF16.
const Loops* loops();
float quantize(const void* x, const float* equal, int64_t d, DType dtype, int8_t* q) noexcept;
void measure(const uint8_t* codes, int64_t rows, int64_t d, Code code, const int8_t* q,
             int64_t batch, int32_t* y, int64_t y_stride) noexcept;
void project(const ProjectParams& p, int64_t first, int64_t n) noexcept;
Kept keep(const int32_t* y, float scale, const float* row_scale, int64_t n, float threshold,
          float* usage) noexcept;
void gather(const ExecuteParams& p, const void* x, const int32_t* neuron, int64_t n, bool first,
            float* sum) noexcept;
void finish(const float* sums, int64_t n_segments, int64_t d, DType dtype, void* out) noexcept;
}  // namespace avx512

// The loops in use, see isa.h.
const Loops& loops();

}  // namespace csfast
