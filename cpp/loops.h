// The inner loops of the operations on the CPU, once per instruction set.
//
// A loop checks nothing, allocates nothing, throws nothing and starts no thread.
#pragma once

#include <cstdint>

#include "csfast/engine.h"
#include "csfast/execute.h"
#include "csfast/linear.h"
#include "csfast/nested.h"
#include "csfast/planes.h"
#include "csfast/project.h"
#include "csfast/recover.h"
#include "csfast/sense.h"
#include "csfast/sketch.h"
#include "csfast/types.h"
#include "viterbi.h"

namespace csfast {

inline constexpr int64_t kBlock = 64;  // neurons per call: one bit each in a mask

// The measurements of neighbouring neurons of one row of the batch, see recover.h.
struct Measured {
  const void* y;           // (n, columns), int32 or float32
  const float* row_scale;  // (n, columns)
  const float* offset;     // (n, columns), or null
  float scale;
  int columns;
  bool is_float;  // y
  Activation activation;
};

// What recovery by threshold says about one block of neurons or groups.
struct Kept {
  uint64_t mask;  // bit i: entry i of the block is kept
  float missed;   // sum of usage^2 over the others
};

// Neighbouring rows of the batch that go through the same neurons, see execute.h.
struct Rows {
  const void* x;       // (n, d), T
  float* sum;          // (n, d) at a distance of sum_stride, written
  int64_t sum_stride;  // floats from one row's sum to the next one's
  int64_t n;
};

// What one head of keys and values gives to the queries that share it, over neighbouring positions
// of one text, none of them in another kAttentionSplit.
struct AttendPart {
  const float* q;    // (n_heads, head_dim)
  const void* k;     // (position / 16, head_dim, 16), T, from position 0 on
  const void* v;     // (position, head_dim), T
  float* out;        // (n_heads, head_dim + 2), written: the sum, its largest score, its weight
  int64_t head_dim;  // a multiple of 16
  int64_t n_heads;
  int64_t first, last;  // positions [first, last), at least one
  float scale;          // of scores
  float cap;            // of scores, or 0 for none
  DType dtype;          // T, float32 or bfloat16
};

// The largest of some logits, the first of equals, and the sum of exp(logit - most).
struct Likeliest {
  float most;
  float sum;  // not-a-number if a logit is
  int64_t index;
};

struct Loops {
  const char* name;

  // One row of x (d) to q (q_width), see sense.h. Returns its scale.
  float (*quantize)(const void* x, const float* equal, int64_t d, DType dtype, int8_t* q) noexcept;

  // y[b * y_stride + r] of `rows` neighbouring rows of codes, r in [0, rows), and q (batch,
  // q_width).
  void (*measure)(const uint8_t* codes, int64_t rows, int64_t d, Code code, const int8_t* q,
                  int64_t batch, int32_t* y, int64_t y_stride) noexcept;

  // y[b * y_stride + 2 j + r] of the neurons j < n that `level` begins with and q (batch, q_width);
  // added to what y holds if `more`. See nested.h.
  void (*measure_level)(const NestedLevel& level, int64_t n, int64_t d, const int8_t* q,
                        int64_t batch, bool more, float* y, int64_t y_stride) noexcept;

  // Measurements first .. first + n - 1 of every row of the batch, see project.h.
  void (*project)(const ProjectParams& p, int64_t first, int64_t n) noexcept;

  // usage (n) of n neurons.
  void (*usage)(const Measured& m, int64_t n, float* usage) noexcept;

  // The decision on usage (n), n <= kBlock.
  Kept (*keep)(const float* usage, int64_t n, float threshold) noexcept;

  // Adds to the sum of every row, zeroed before if this is the `first` call for them, what `n`
  // neurons contribute to its output. A row's result does not depend on the others. The n_ahead
  // neurons that follow in the list come in the caller's next call, and are asked for meanwhile.
  void (*gather)(const ExecuteParams& p, const Rows& rows, const int32_t* neuron, int64_t n,
                 int64_t n_ahead, bool first) noexcept;

  // c (n) -= sum_i step[i] * gram[row[i], :] over `rows` rows of gram (n, n), see omp.h. Returns
  // the bits of the largest |c[j] * weight[j]|, what is not a number on top.
  int32_t (*subtract)(const float* gram, int64_t n, const int32_t* row, const float* step,
                      int64_t rows, const float* weight, float* c) noexcept;

  // The best path of kLanes sequences: index and u (steps, kLanes) of the least sum of weight *
  // (target - level)^2, both (steps, kLanes). See encode.h.
  void (*trellis)(const Trellis& t, const float* target, const float* weight, int64_t steps,
                  TrellisWork& work, uint8_t* index, uint8_t* u) noexcept;

  // One row of x (cols) to z (cols) and q (sketch_width), see sketch.h. Returns its scale.
  float (*rotate)(const void* x, const uint32_t* turn, int64_t cols, DType dtype, float* z,
                  int8_t* q) noexcept;

  // n_l of the 64 rows of one row tile and of every row of q (batch, sketch_width), into sum
  // (batch, 64). `before` are the codes of the row tile before, and of the one before that, or
  // null.
  void (*multiply)(const uint8_t* codes, const uint8_t* const before[2], int64_t cols, int bits,
                   const int8_t* q, int64_t batch, int32_t* sum) noexcept;

  // One row of x (cols) to work (linear_width), rounded to `dtype`, see linear.h; in an order of
  // the instruction set's own.
  void (*linear_input)(const float* x, int64_t cols, DType dtype, float* work) noexcept;

  // y of rows first .. first + n - 1 of w and of rows b .. b + batch - 1 of work, see linear.h.
  void (*linear)(const LinearParams& p, int64_t first, int64_t n, int64_t b,
                 int64_t batch) noexcept;

  // y (n) -= scale * x (n), rounded twice.
  void (*subtract_scaled)(const float* x, float scale, int64_t n, float* y) noexcept;

  // y (n) = x / sqrt(mean(x^2) + eps) * gain; gain (n), or null for 1.
  void (*norm)(const float* x, const float* gain, int64_t n, float eps, float* y) noexcept;

  // y (n) = activation(gate) * up.
  void (*gated)(Activation activation, const float* gate, const float* up, int64_t n,
                float* y) noexcept;

  void (*attend)(const AttendPart& p) noexcept;

  // Of logits (n), capped in place before that if cap > 0.
  Likeliest (*likeliest)(float* logits, int64_t n, float cap) noexcept;

  // out (d) = the segments of sums (n_segments, d) added in order, and bias (d), T, unless that is
  // null; rounded to T once.
  void (*finish)(const float* sums, int64_t n_segments, int64_t d, DType dtype, const void* bias,
                 void* out) noexcept;
};

namespace base {
extern const Loops kLoops;
#include "loops.inc"
}  // namespace base

namespace avx2 {
// Null where the processor lacks one of AVX2, FMA and F16C.
const Loops* loops();
#include "loops.inc"
}  // namespace avx2

namespace avx512 {
// Null where the processor lacks one of AVX-512 F, BW, DQ, VL, VNNI and BF16.
const Loops* loops();
#include "loops.inc"
}  // namespace avx512

// The loops in use, see isa.h.
const Loops& loops();

}  // namespace csfast
