// Omp: few atoms of a dictionary that explain a signal, by orthogonal matching pursuit.
//
// All problems of a batch share the dictionary A, which is known by its Gram matrix A' A; a signal
// y is known by its correlation A' y and its energy |y|^2. With S the atoms taken so far,
//
//   x = argmin |y - A_S x|,  r = y - A_S x,  take  argmax_j |<a_j, r>| / |a_j|    (docs/math.md)
//
// until one of these, asked in this order:
//   kZero        energy is 0
//   kConverged   |r|^2 <= tolerance * energy, or no atom explains a share of it that float32 can
//                tell from nothing: max_j <a_j, r>^2 / |a_j|^2 <= kNothing * energy
//   kBudget      budget atoms are taken
//   kNotFinite   the correlation, the energy, the diagonal of gram or a row of it that was used has
//                an entry that is not finite, or the energy or the diagonal one that is negative:
//                nothing is kept, residual is NaN. Asked of correlation, energy and diagonal first.
//   kDependent   of |a_j|^2 of the next atom no more than the share kPivot is not in the span of S
//
// Atoms need not be of unit norm; one of norm 0 is never taken. Ties go to the lower index. Scaling
// a signal by a power of two scales coef and residual by it, bit for bit, while all stay normal
// numbers. Correlations are float32, what is summed over atoms is float64. A residual below 2^-12
// of the signal's norm is noise of the float32 energy.
#pragma once

#include <cstdint>

#include "csfast/types.h"

namespace csfast {

enum class OmpStatus : int32_t { kConverged, kBudget, kZero, kDependent, kNotFinite };

// A correlation is off by some 2^-24 of the signal's norm a step: 2^-18 for 64 steps.
inline constexpr double kNothing = 0x1p-36;
// A pivot is off by the rounding of gram, 2^-24, times how badly the atoms before it are
// conditioned. At 2^-18 the atom's coefficient has two digits.
inline constexpr double kPivot = 0x1p-18;

struct OmpParams {
  const float* gram;         // (n_atoms, n_atoms), symmetric
  const float* correlation;  // (batch, n_atoms)
  const float* energy;       // (batch)
  const int32_t* budget;     // (batch), each in [0, budget_max]
  void* workspace;           // omp_workspace() bytes, 64-byte aligned, content irrelevant
  int32_t* index;            // (batch, budget_max), written: in the order taken, 0 beyond count
  float* coef;               // (batch, budget_max), written: x, 0 beyond count
  int32_t* count;            // (batch), written
  float* residual;           // (batch), written: |r|
  int32_t* status;           // (batch), written: an OmpStatus
  int64_t batch, n_atoms, budget_max;
  float tolerance;  // in [0, 1]
};

// Bytes of workspace that omp wants on `device`.
int64_t omp_workspace(int64_t batch, int64_t n_atoms, int64_t budget_max, Device device);

// Throws std::invalid_argument for sizes and values that make no sense (budgets are looked at on
// the CPU only; on CUDA they are clamped), BackendError if the device fails. Asynchronous on CUDA.
void omp(const OmpParams& p, Device device, Stream stream);

// How one problem's share of the workspace is cut into arrays: offsets in bytes.
struct OmpLayout {
  int64_t inverse;      // (budget_max, budget_max) double: F, upper triangle, see math.md
  int64_t partial;      // (budget_max) double
  int64_t coef;         // (budget_max) double
  int64_t step;         // (budget_max) float
  int64_t correlation;  // (n_atoms) float: <a_j, r>
  int64_t weight;       // (n_atoms) float: 1 / |a_j|, 0 for what may not be taken
  int64_t bytes;

  constexpr OmpLayout(int64_t n_atoms, int64_t budget_max)
      : inverse(0),
        partial(padded(8 * budget_max * budget_max)),
        coef(partial + padded(8 * budget_max)),
        step(coef + padded(8 * budget_max)),
        correlation(step + padded(4 * budget_max)),
        weight(correlation + padded(4 * n_atoms)),
        bytes(weight + padded(4 * n_atoms)) {}

 private:
  static constexpr int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
};

namespace cuda {
void omp(const OmpParams& p, Stream stream);
}

}  // namespace csfast
