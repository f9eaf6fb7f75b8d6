// Omp: few atoms of a dictionary that explain a signal, by orthogonal matching pursuit.
//
// A dictionary A is known by its Gram matrix A' A, a signal y by its correlation A' y and its
// energy |y|^2. With S the atoms taken so far and groups of neighbouring atoms (of one atom each,
// unless asked otherwise) as the units that are scored and taken,
//
//   x = argmin |y - A_S x|,  r = y - A_S x                                        (docs/math.md)
//   score_g = sqrt(sum over the atoms of g that are free of (<a_j, r> / |a_j|)^2)
//   take the per_step groups of the largest scores, refit
//
// until one of these, asked in this order before every step:
//   kZero        energy is 0: nothing is taken, not even of start
//   kConverged   |r|^2 <= max(tolerance * energy, residual_max^2), or no group is left whose score
//                is above max(correlation_min, sqrt(kNothing)) * |y|. Only such groups are taken,
//                so a step may take fewer than per_step. (Scores are asked after kNoGain and
//                kBudget.)
//   kNoGain      the last step lowered |r|^2 by less than gain_min * energy; its atoms are kept
//   kBudget      a whole group no longer fits into the budget; a step takes as many as do
//   kNotFinite   the correlation, the energy, the diagonal of gram or a row of it that was used has
//                an entry that is not finite, or the energy or the diagonal one that is negative:
//                nothing is kept, residual is NaN. Asked of correlation, energy and diagonal first.
//   kDependent   the step took no atom. An atom is passed over, for good, if the share of |a_j|^2
//                that is not in the span of S, times the least such share of an atom taken, is no
//                more than kPivot.
//
// The atoms of start are taken before the first step, in their order, as far as the budget goes;
// none of the rules above ends that, and dependent ones are passed over.
//
// Atoms need not be of unit norm; one of norm 0 is never taken. Within a step groups come by
// descending score, ties by the lower index, and the atoms of a group by index. Scaling a signal by
// a power of two scales coef and residual by it, bit for bit, while all stay normal numbers and
// residual_max is 0. A residual below 2^-12 of the signal's norm is noise of the float32 energy.
//
// On the CPU correlations are float32, what is summed over atoms is float64. On CUDA so it is in
// the general kernel; the others keep everything in float32 and solve for coef in float64.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "csfast/types.h"

namespace csfast {

enum class OmpStatus : int32_t { kConverged, kBudget, kZero, kDependent, kNotFinite, kNoGain };

// A correlation is off by some 2^-24 of the signal's norm a step: 2^-18 for 64 steps.
inline constexpr double kNothing = 0x1p-36;
// A share is off by some roundings of 2^-24, of gram and of what is computed from it, magnified by
// how badly the atoms before it are conditioned: by 1 / the least share before it. With 2^6 of
// them, the atom's coefficient has its sign.
inline constexpr double kPivot = 0x1p-18;

// Which kernel: where it keeps D, and how many atoms a thread has.
enum class OmpKernel : int32_t {
  kAuto,     // asked for: kQuad where it fits, else the cheapest of the others
  kGeneral,  // everything in memory
  kFlat,     // 4 atoms a thread, 12 rows in registers, the rest in shared memory: least latency
  kDeep,     // 8 atoms a thread, 16 rows in registers: fewest instructions
  kWide,     // 8 atoms a thread, no rows in registers: most atoms
  kQuad,     // 4 atoms a thread, all rows in registers, one atom a step: the shortest chain
};

// From its name, such as "flat"; kAuto from none. Throws std::invalid_argument for others.
OmpKernel parse_omp_design(std::string_view name);

struct OmpParams {
  const float* gram;           // (n_dictionaries, n_atoms, n_atoms), each symmetric
  const float* correlation;    // (batch, n_atoms)
  const float* energy;         // (batch)
  const int32_t* budget;       // (batch), each in [0, budget_max]
  const int32_t* dictionary;   // (batch), each in [0, n_dictionaries); null: all 0
  const int32_t* start;        // (batch, n_start), each in [0, n_atoms); null: none
  const int32_t* start_count;  // (batch), each in [0, n_start]; null: all n_start
  void* workspace;             // omp_workspace() bytes, 64-byte aligned, content irrelevant
  int32_t* index;              // (batch, budget_max), written: in the order taken, 0 beyond count
  float* coef;                 // (batch, budget_max), written: x, 0 beyond count; null: not wanted
  int32_t* count;              // (batch), written
  float* residual;             // (batch), written: |r|
  int32_t* status;             // (batch), written: an OmpStatus
  int64_t batch, n_atoms, budget_max, n_dictionaries, n_start;
  int64_t per_step;       // groups a step, at least 1
  int64_t group;          // atoms a group; divides n_atoms, at most budget_max
  float tolerance;        // in [0, 1]
  float residual_max;     // in the unit of the signals, at least 0
  float correlation_min;  // in [0, 1]
  float gain_min;         // in [0, 1]
  OmpKernel design;       // on CUDA: which kernel; of no account on the CPU
};

// Bytes of workspace that omp wants on `device`.
int64_t omp_workspace(int64_t batch, int64_t n_atoms, int64_t budget_max, OmpKernel design,
                      Device device);

// Throws std::invalid_argument for sizes and values that make no sense (budgets, dictionaries and
// starts are looked at on the CPU only; on CUDA budgets and start counts are clamped, and problems
// of another dictionary and atoms of start out of range are kNotFinite and passed over),
// BackendError if the device fails. Asynchronous on CUDA.
void omp(const OmpParams& p, Device device, Stream stream);

// How one problem's share of the workspace is cut into arrays, on the CPU and in the general
// kernel: offsets in bytes.
struct OmpLayout {
  int64_t inverse;      // (budget_max, budget_max) double: F, upper triangle, see math.md
  int64_t partial;      // (budget_max) double
  int64_t along;        // (budget_max) double: z
  int64_t step;         // (budget_max) float
  int64_t correlation;  // (n_atoms) float: <a_j, r>
  int64_t weight;       // (n_atoms) float: 1 / |a_j|, 0 for what may not be taken
  int64_t score;        // (n_atoms) float: of each group
  int64_t pick;         // (budget_max) int32: groups of this step
  int64_t bytes;

  constexpr OmpLayout(int64_t n_atoms, int64_t budget_max)
      : inverse(0),
        partial(padded(8 * budget_max * budget_max)),
        along(partial + padded(8 * budget_max)),
        step(along + padded(8 * budget_max)),
        correlation(step + padded(4 * budget_max)),
        weight(correlation + padded(4 * n_atoms)),
        score(weight + padded(4 * n_atoms)),
        pick(score + padded(4 * n_atoms)),
        bytes(pick + padded(4 * budget_max)) {}

  static constexpr int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
};

// What a CUDA device has. "Processor" is a streaming multiprocessor.
struct OmpDevice {
  int processors;
  int registers;                 // of a processor, 4 bytes each
  int threads;                   // that a processor can have at work
  int64_t shared_per_block;      // bytes, the most that a block may ask for
  int64_t shared_per_processor;  // bytes
};

inline constexpr int kOmpGeneralThreads = 256;  // eight blocks fill a processor of 2048
inline constexpr int kOmpHeldFlat = 12;         // rows of D in registers: 48 of a thread's 128
inline constexpr int kOmpHeldDeep = 16;         // 128 of 255

inline constexpr int kOmpQuadAtoms = 1024;       // of a dictionary, at most
inline constexpr int kOmpQuadBudget = 32;        // at most: 28 rows in registers, 112 of 255
inline constexpr int kOmpQuadThreadsMax = 256;   // of 255 registers
inline constexpr int64_t kOmpQuadShared = 5248;  // bytes beside D, see cuda/omp/quad.cuh

// How a batch is launched.
struct OmpPlan {
  OmpKernel kernel;
  int blocks;          // each takes one problem after another
  int threads;         // a block
  int atoms;           // a thread
  int held;            // rows of D in registers
  int rows_shared;     // rows in shared memory
  int rows_spilled;    // rows in the workspace
  bool factor_shared;  // R in shared memory, or in the workspace
  int resident;        // blocks that a processor has at work at a time
  int64_t shared;      // bytes of shared memory a block
  int64_t workspace;   // bytes, all blocks together
};

// How a block of the kernels that keep their problem on the chip cuts its shared memory, and its
// share of the workspace, into arrays: offsets in bytes.
struct OmpChipLayout {
  int64_t slots;      // (2, warps) OmpSlot
  int64_t rows;       // (rows_shared, pitch) float: D
  int64_t square;     // (pitch) float: the diagonal of gram
  int64_t score;      // (pitch) float
  int64_t solved;     // (budget_max) double
  int64_t along;      // (budget_max) float: z
  int64_t scale;      // (budget_max) float: 1 / the diagonal of R
  int64_t index;      // (budget_max) int32
  int64_t pick;       // (budget_max) int32
  int64_t exponent;   // int
  int64_t shared;     // bytes, with R if it is there
  int64_t spilled;    // in the workspace: (rows_spilled, pitch) float: D
  int64_t factor;     // where plan.factor_shared says: R above its diagonal, column after column
  int64_t workspace;  // bytes

  constexpr OmpChipLayout(const OmpPlan& plan, int64_t budget_max)
      : slots(0),
        rows(padded(2 * (plan.threads / 32) * slot_bytes(plan.held))),
        square(rows + plan.rows_shared * row_bytes(plan)),
        score(square + row_bytes(plan)),
        solved(score + row_bytes(plan)),
        along(solved + padded(8 * budget_max)),
        scale(along + padded(4 * budget_max)),
        index(scale + padded(4 * budget_max)),
        pick(index + padded(4 * budget_max)),
        exponent(pick + padded(4 * budget_max)),
        shared(exponent + padded(4) + (plan.factor_shared ? factor_bytes(budget_max) : 0)),
        spilled(0),
        factor(plan.factor_shared ? exponent + padded(4) : plan.rows_spilled * row_bytes(plan)),
        workspace(plan.rows_spilled * row_bytes(plan) +
                  (plan.factor_shared ? 0 : factor_bytes(budget_max))) {}

  static constexpr int64_t padded(int64_t bytes) { return OmpLayout::padded(bytes); }
  static constexpr int64_t slot_bytes(int held) { return 32 + 4 * (held > 0 ? held : 4); }
  static constexpr int64_t row_bytes(const OmpPlan& plan) {
    return int64_t{4} * plan.atoms * plan.threads;
  }
  static constexpr int64_t factor_bytes(int64_t budget_max) {
    return padded(4 * budget_max * (budget_max - 1) / 2);
  }
};

// Chooses without looking at a device, so that every choice can be tested on any machine. `single`
// says that a step takes one atom and that gram and correlation begin at multiples of 16 bytes:
// without it kQuad is not chosen by itself. Throws std::invalid_argument if the kernel that was
// asked for does not take these sizes there.
OmpPlan choose_omp(int64_t batch, int64_t n_atoms, int64_t budget_max, bool single,
                   const OmpDevice& device, OmpKernel asked);
std::string describe(const OmpPlan& plan);

namespace cuda {
int64_t omp_workspace(int64_t batch, int64_t n_atoms, int64_t budget_max, OmpKernel design);
void omp(const OmpParams& p, Stream stream);
}  // namespace cuda

}  // namespace csfast
