// Omp on CUDA: one block per problem, the whole pursuit in one launch.
//
// A step reads the rows of gram of all atoms taken, which the L2 cache holds: budget^2 / 2 *
// n_atoms elements in all, bound by that cache. Every thread keeps to its own atoms, so that only
// what is summed over atoms taken crosses threads, by way of the workspace.
#include "common/launch.cuh"
#include "common/warp.cuh"
#include "common/workspace.cuh"
#include "csfast/omp.h"

namespace csfast::cuda {
namespace {

constexpr int kWarps = 8;  // 256 threads: four atoms each at 1024, and several blocks an SM
constexpr int kThreads = kWarps * kWarp;
constexpr unsigned kInfinity = 0x7f800000u;  // as bits; what is not a number lies above

struct Shared {
  uint64_t best[kWarps];
  double sum[kWarps];
};

// Orders as the magnitudes do, with what is not a number on top.
__device__ __forceinline__ unsigned magnitude(float v) {
  return __float_as_uint(v) & 0x7fffffffu;
}

// Orders as the scores do, equal ones by the lower atom first.
__device__ __forceinline__ uint64_t key_of(unsigned score, int64_t atom) {
  return uint64_t{score} << 32 | (0xffffffffu - static_cast<unsigned>(atom));
}

// The largest of every thread's `v`, in every thread.
__device__ __forceinline__ uint64_t block_max(Shared& shared, uint64_t v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    v = max(v, __shfl_xor_sync(kFull, v, offset));
  }
  __syncthreads();  // the last call's values have been read
  if (threadIdx.x % kWarp == 0) shared.best[threadIdx.x / kWarp] = v;
  __syncthreads();
  for (const uint64_t other : shared.best) v = max(v, other);
  return v;
}

// The sum of every thread's `v`, in every thread, always in the same order.
__device__ __forceinline__ double block_sum(Shared& shared, double v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kFull, v, offset);
  __syncthreads();  // the last call's values have been read
  if (threadIdx.x % kWarp == 0) shared.sum[threadIdx.x / kWarp] = v;
  __syncthreads();
  double total = 0.0;
  for (const double part : shared.sum) total += part;
  return total;
}

// What a problem works on, as cpp/omp.cc has it. Every thread has the same scalars.
struct Pursuit {
  const float* gram;   // (n, n)
  double* inverse;     // (width, width)
  double* partial;     // (width)
  double* coef;        // (width)
  float* step;         // (width)
  float* correlation;  // (n)
  float* weight;       // (n)
  int32_t* index;      // (width)
  int64_t n, width;
  double energy, left;
  int exponent, count;
};

// Scales the signal and finds the first atom: its key, which is above that of any finite score if
// something is not finite.
__device__ __forceinline__ uint64_t load(Shared& shared, Pursuit& pursuit, const float* correlation,
                                         float energy) {
  unsigned peak = 0;
  unsigned worst = isfinite(energy) && energy >= 0.0f ? 0 : kInfinity;
  for (int64_t j = threadIdx.x; j < pursuit.n; j += kThreads) {
    const float square = pursuit.gram[j * pursuit.n + j];
    const float weight = square == 0.0f ? 0.0f : __fdiv_rn(1.0f, __fsqrt_rn(square));
    pursuit.weight[j] = weight;
    peak = max(peak, magnitude(correlation[j]));
    worst = max(worst, max(magnitude(weight), magnitude(square)));
  }
  peak = static_cast<unsigned>(block_max(shared, peak));
  worst = static_cast<unsigned>(block_max(shared, worst));
  if (peak >= kInfinity || worst >= kInfinity) return key_of(kInfinity, 0);

  pursuit.exponent = peak > 0 ? ilogbf(__uint_as_float(peak)) : 0;
  const double factor = ldexp(1.0, -pursuit.exponent);
  pursuit.energy = pursuit.left = energy * factor * factor;
  uint64_t best = 0;
  for (int64_t j = threadIdx.x; j < pursuit.n; j += kThreads) {
    const float c = static_cast<float>(correlation[j] * factor);
    pursuit.correlation[j] = c;
    best = max(best, key_of(magnitude(__fmul_rn(c, pursuit.weight[j])), j));
  }
  return block_max(shared, best);
}

// Refits with one atom more, or says that it depends on those taken.
__device__ __forceinline__ bool take(Shared& shared, Pursuit& pursuit, int64_t atom) {
  const float* row = pursuit.gram + atom * pursuit.n;  // (n)
  const int taken = pursuit.count;
  const int64_t width = pursuit.width;
  double squares = 0.0;
  for (int s = static_cast<int>(threadIdx.x); s < taken; s += kThreads) {
    double sum = 0.0;
    for (int i = 0; i <= s; ++i) sum += pursuit.inverse[i * width + s] * row[pursuit.index[i]];
    pursuit.partial[s] = sum;
    squares += sum * sum;
  }
  const double pivot = row[atom] - block_sum(shared, squares);  // orders partial, too
  if (!(pivot > kPivot * row[atom])) return false;

  const double scale = 1.0 / sqrt(pivot);
  const double along = pursuit.correlation[atom] * scale;
  for (int i = static_cast<int>(threadIdx.x); i <= taken; i += kThreads) {
    double sum = i == taken ? -1.0 : 0.0;
    for (int s = i; s < taken; ++s) sum += pursuit.inverse[i * width + s] * pursuit.partial[s];
    const double step = -along * scale * sum;
    pursuit.inverse[i * width + taken] = -scale * sum;
    pursuit.coef[i] = (i == taken ? 0.0 : pursuit.coef[i]) + step;
    pursuit.step[i] = static_cast<float>(step);
  }
  if (threadIdx.x == 0) {
    pursuit.index[taken] = static_cast<int32_t>(atom);
    pursuit.weight[atom] = 0.0f;
  }
  __syncthreads();  // orders step, index and weight, and that everyone has read correlation[atom]
  pursuit.left = max(pursuit.left - along * along, 0.0);
  ++pursuit.count;
  return true;
}

// Brings the correlations up to date; gives the key of the next atom.
__device__ __forceinline__ uint64_t subtract(Shared& shared, const Pursuit& pursuit) {
  uint64_t best = 0;
  for (int64_t j = threadIdx.x; j < pursuit.n; j += kThreads) {
    float c = pursuit.correlation[j];
    for (int i = 0; i < pursuit.count; ++i) {
      c = __fmaf_rn(-pursuit.step[i], __ldg(pursuit.gram + pursuit.index[i] * pursuit.n + j), c);
    }
    pursuit.correlation[j] = c;
    best = max(best, key_of(magnitude(__fmul_rn(c, pursuit.weight[j])), j));
  }
  return block_max(shared, best);
}

__device__ __forceinline__ OmpStatus pursue(Shared& shared, Pursuit& pursuit, uint64_t next,
                                            float energy, float tolerance, int64_t budget) {
  if (next >> 32 >= kInfinity) return OmpStatus::kNotFinite;
  if (energy == 0.0f) return OmpStatus::kZero;
  for (;;) {
    if (pursuit.left <= tolerance * pursuit.energy) return OmpStatus::kConverged;
    if (pursuit.count == budget) return OmpStatus::kBudget;
    if (next >> 32 >= kInfinity) return OmpStatus::kNotFinite;
    const double score = __uint_as_float(static_cast<unsigned>(next >> 32));
    if (score * score <= kNothing * pursuit.energy) return OmpStatus::kConverged;
    const int64_t atom = 0xffffffffu - static_cast<unsigned>(next);
    if (!take(shared, pursuit, atom)) return OmpStatus::kDependent;
    next = subtract(shared, pursuit);
  }
}

__global__ void __launch_bounds__(kThreads) omp_kernel(const OmpParams p) {
  __shared__ Shared shared;
  const int64_t b = blockIdx.x;
  const OmpLayout layout(p.n_atoms, p.budget_max);
  const int64_t start = b * layout.bytes;
  float* coef = p.coef + b * p.budget_max;  // (budget_max)
  const int64_t budget = min(max(int64_t{p.budget[b]}, int64_t{0}), p.budget_max);

  Pursuit pursuit{.gram = p.gram,
                  .inverse = at<double>(p.workspace, start + layout.inverse),
                  .partial = at<double>(p.workspace, start + layout.partial),
                  .coef = at<double>(p.workspace, start + layout.coef),
                  .step = at<float>(p.workspace, start + layout.step),
                  .correlation = at<float>(p.workspace, start + layout.correlation),
                  .weight = at<float>(p.workspace, start + layout.weight),
                  .index = p.index + b * p.budget_max,
                  .n = p.n_atoms,
                  .width = p.budget_max,
                  .energy = 0.0,
                  .left = 0.0,
                  .exponent = 0,
                  .count = 0};
  const uint64_t first = load(shared, pursuit, p.correlation + b * p.n_atoms, p.energy[b]);
  const OmpStatus status = pursue(shared, pursuit, first, p.energy[b], p.tolerance, budget);

  // Write. The last barrier lies behind the last writes to coef and index.
  const bool failed = status == OmpStatus::kNotFinite;
  const int count = failed ? 0 : pursuit.count;
  for (int64_t i = threadIdx.x; i < p.budget_max; i += kThreads) {
    if (i >= count) pursuit.index[i] = 0;
    coef[i] = i < count ? static_cast<float>(ldexp(pursuit.coef[i], pursuit.exponent)) : 0.0f;
  }
  if (threadIdx.x == 0) {
    p.count[b] = count;
    p.residual[b] = failed ? __uint_as_float(0x7fc00000u)  // NaN
                           : static_cast<float>(ldexp(sqrt(pursuit.left), pursuit.exponent));
    p.status[b] = static_cast<int32_t>(status);
  }
}

}  // namespace

void omp(const OmpParams& p, Stream stream) {
  launch("omp", "omp", omp_kernel, dim3(static_cast<unsigned>(p.batch)), dim3(kThreads), stream, p);
}

}  // namespace csfast::cuda
