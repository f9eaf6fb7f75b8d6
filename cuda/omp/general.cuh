// Omp for dictionaries of any size: one block a problem, everything that it works on in memory.
//
// A step reads the rows of gram of all atoms taken, which the L2 cache holds as far as they fit:
// budget^2 / 2 * n_atoms elements in all, bound by that cache. Every thread keeps to its own atoms,
// so that only what is summed over atoms taken crosses threads, by way of the workspace.
#pragma once

#include "common/workspace.h"
#include "omp/rules.cuh"

namespace csfast::cuda {

inline constexpr int kGeneralWarps = kOmpGeneralThreads / kWarp;

// The progressive form with the inverse factor, as cpp/omp.cc has it: eq. 14 and 15.
class General {
 public:
  static constexpr bool kSingle = false;
  struct Shared {
    uint64_t best[kGeneralWarps];
    double sum[2][kGeneralWarps];
  };

  __device__ General(Shared& shared, const OmpParams& p, void* workspace, int64_t offset)
      : shared_(shared),
        n_(static_cast<int>(p.n_atoms)),
        width_(static_cast<int>(p.budget_max)),
        group_(static_cast<int>(p.group)) {
    const OmpLayout layout(p.n_atoms, p.budget_max);
    inverse_ = at<double>(workspace, offset + layout.inverse);
    partial_ = at<double>(workspace, offset + layout.partial);
    along_ = at<double>(workspace, offset + layout.along);
    step_ = at<float>(workspace, offset + layout.step);
    correlation_ = at<float>(workspace, offset + layout.correlation);
    weight_ = at<float>(workspace, offset + layout.weight);
    score_ = at<float>(workspace, offset + layout.score);
    pick_ = at<int32_t>(workspace, offset + layout.pick);
  }

  __device__ bool load(const OmpParams& p, int b);
  __device__ Taken take(int atom);
  __device__ unsigned best();
  __device__ int pick(int most, double limit, unsigned best);
  __device__ int picked(int i) const { return pick_[i]; }
  __device__ void write(const OmpParams& p, int b, OmpStatus status);

  double energy = 0.0, left = 0.0, gained = 0.0;
  int exponent = 0, count = 0;

 private:
  __device__ uint64_t block_max(uint64_t v);
  __device__ void block_sum(double& a, double& b);
  __device__ uint64_t best_group() const;

  Shared& shared_;
  const int n_, width_, group_;
  const float* gram_ = nullptr;  // (n, n)
  int32_t* index_ = nullptr;     // (width)
  double* inverse_;              // (width, width)
  double* partial_;              // (width)
  double* along_;                // (width)
  float* step_;                  // (width)
  float* correlation_;           // (n)
  float* weight_;                // (n)
  float* score_;                 // (n / group)
  int32_t* pick_;                // (width)
  double least_ = 1.0;           // share of an atom taken that was not in the span before it
  int known_ = 0;                // atoms that the correlations are up to date with
  uint64_t key_ = 0;             // of the best group
};

// Orders as the scores do, equal ones by the lower atom first.
__device__ __forceinline__ uint64_t key_of(unsigned score, int atom) {
  return uint64_t{score} << 32 | (0xffffffffu - static_cast<unsigned>(atom));
}

__device__ __forceinline__ int group_of(uint64_t key) {
  return static_cast<int>(0xffffffffu - static_cast<unsigned>(key));
}

// The largest of every thread's `v`, in every thread.
__device__ __forceinline__ uint64_t General::block_max(uint64_t v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    v = max(v, __shfl_xor_sync(kFull, v, offset));
  }
  __syncthreads();  // the last call's values have been read
  if (threadIdx.x % kWarp == 0) shared_.best[threadIdx.x / kWarp] = v;
  __syncthreads();
  for (const uint64_t other : shared_.best) v = max(v, other);
  return v;
}

// The sums of every thread's `a` and `b`, in every thread, always in the same order.
__device__ __forceinline__ void General::block_sum(double& a, double& b) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    a += __shfl_xor_sync(kFull, a, offset);
    b += __shfl_xor_sync(kFull, b, offset);
  }
  __syncthreads();  // the last call's values have been read
  if (threadIdx.x % kWarp == 0) {
    shared_.sum[0][threadIdx.x / kWarp] = a;
    shared_.sum[1][threadIdx.x / kWarp] = b;
  }
  __syncthreads();
  a = b = 0.0;
  for (int i = 0; i < kGeneralWarps; ++i) {
    a += shared_.sum[0][i];
    b += shared_.sum[1][i];
  }
}

__device__ __forceinline__ bool General::load(const OmpParams& p, int b) {
  const float* correlation = p.correlation + int64_t{b} * n_;  // (n)
  const float signal = p.energy[b];
  const int dictionary = p.dictionary == nullptr ? 0 : p.dictionary[b];
  count = known_ = 0;
  index_ = p.index + int64_t{b} * width_;
  if (dictionary < 0 || dictionary >= p.n_dictionaries) return false;
  gram_ = p.gram + int64_t{dictionary} * n_ * n_;

  unsigned peak = 0;
  unsigned worst = isfinite(signal) && signal >= 0.0f ? 0 : kInfinity;
  for (int j = static_cast<int>(threadIdx.x); j < n_; j += kOmpGeneralThreads) {
    const float square = gram_[int64_t{j} * n_ + j];
    const float weight = weight_of(square);
    weight_[j] = weight;
    peak = max(peak, magnitude(correlation[j]));
    worst = max(worst, max(magnitude(weight), magnitude(square)));
  }
  peak = static_cast<unsigned>(block_max(peak));
  worst = static_cast<unsigned>(block_max(worst));
  if (peak >= kInfinity || worst >= kInfinity) return false;

  exponent = peak > 0 ? exponent_of(peak) : 0;
  const double factor = power_of_two(-exponent);
  energy = left = signal * factor * factor;
  least_ = 1.0;
  for (int j = static_cast<int>(threadIdx.x); j < n_; j += kOmpGeneralThreads) {
    correlation_[j] = static_cast<float>(correlation[j] * factor);
  }
  __syncthreads();  // orders correlation and weight, which take() reads of other threads
  return true;
}

__device__ __forceinline__ Taken General::take(int atom) {
  if (weight_[atom] == 0.0f) return Taken::kPassedOver;
  const float* row = gram_ + int64_t{atom} * n_;  // (n)
  const int taken = count;
  double squares = 0.0, since = 0.0;
  for (int t = static_cast<int>(threadIdx.x); t < taken; t += kOmpGeneralThreads) {
    double sum = 0.0;
    for (int i = 0; i <= t; ++i) sum += inverse_[int64_t{i} * width_ + t] * row[index_[i]];
    partial_[t] = sum;
    squares += sum * sum;
    if (t >= known_) since += sum * along_[t];
  }
  block_sum(squares, since);  // orders partial, too, and that everyone has read weight
  const double pivot = row[atom] - squares;
  const double correlation = correlation_[atom] - since;
  if (threadIdx.x == 0) weight_[atom] = 0.0f;
  const bool finite = isfinite(pivot) && isfinite(correlation);
  const double share = pivot / row[atom];
  const bool free = finite && share * least_ > kPivot;
  if (free) {
    const double scale = 1.0 / sqrt(pivot);
    for (int i = static_cast<int>(threadIdx.x); i <= taken; i += kOmpGeneralThreads) {
      double sum = i == taken ? -1.0 : 0.0;
      for (int t = i; t < taken; ++t) sum += inverse_[int64_t{i} * width_ + t] * partial_[t];
      inverse_[int64_t{i} * width_ + taken] = -scale * sum;
    }
    if (threadIdx.x == 0) {
      along_[taken] = correlation * scale;
      index_[taken] = atom;
    }
    const double gain = correlation * scale * (correlation * scale);
    left = max(left - gain, 0.0);
    gained += gain;
    least_ = min(least_, share);
    ++count;
  }
  __syncthreads();  // orders weight, inverse, along and index
  return free ? Taken::kTaken : finite ? Taken::kPassedOver : Taken::kNotFinite;
}

// The best of the groups that are this thread's, from score.
__device__ __forceinline__ uint64_t General::best_group() const {
  uint64_t best = 0;
  for (int g = static_cast<int>(threadIdx.x); g < n_ / group_; g += kOmpGeneralThreads) {
    best = max(best, key_of(magnitude(score_[g]), g));
  }
  return best;
}

// Brings the correlations up to date with the atoms taken since the last call.
__device__ __forceinline__ unsigned General::best() {
  const int rows = known_ == count ? 0 : count;
  for (int i = static_cast<int>(threadIdx.x); i < rows; i += kOmpGeneralThreads) {
    double sum = 0.0;
    for (int t = max(i, known_); t < count; ++t)
      sum += inverse_[int64_t{i} * width_ + t] * along_[t];
    step_[i] = static_cast<float>(sum);
  }
  __syncthreads();  // orders step
  uint64_t best = 0;
  for (int j = static_cast<int>(threadIdx.x); j < n_; j += kOmpGeneralThreads) {
    float c = correlation_[j];
    for (int i = 0; i < rows; ++i)
      c = __fmaf_rn(-step_[i], __ldg(gram_ + int64_t{index_[i]} * n_ + j), c);
    correlation_[j] = c;
    const float score = __fmul_rn(c, weight_[j]);
    if (group_ == 1) score_[j] = score;
    best = max(best, key_of(magnitude(score), j));
  }
  known_ = count;
  key_ = block_max(best);  // orders correlation, too
  if (group_ == 1 || key_ >> 32 >= kInfinity) return static_cast<unsigned>(key_ >> 32);

  for (int g = static_cast<int>(threadIdx.x); g < n_ / group_; g += kOmpGeneralThreads) {
    float sum = 0.0f;
    for (int j = g * group_; j < (g + 1) * group_; ++j) {
      const float score = __fmul_rn(correlation_[j], weight_[j]);
      sum = __fmaf_rn(score, score, sum);
    }
    score_[g] = sum;
  }
  key_ = block_max(best_group());
  return static_cast<unsigned>(key_ >> 32);
}

__device__ __forceinline__ int General::pick(int most, double limit, unsigned best) {
  const int groups = n_ / group_;
  int picked = 0;
  while (__uint_as_float(best) > limit) {
    const int g = group_of(key_);
    if (threadIdx.x == 0) pick_[picked] = g;
    if (++picked == most || picked == groups) break;
    if (g % kOmpGeneralThreads == static_cast<int>(threadIdx.x)) score_[g] = 0.0f;
    key_ = block_max(best_group());
    best = static_cast<unsigned>(key_ >> 32);
  }
  __syncthreads();  // orders pick
  return picked;
}

__device__ __forceinline__ void General::write(const OmpParams& p, int b, OmpStatus status) {
  const int kept = status == OmpStatus::kNotFinite ? 0 : count;
  for (int i = static_cast<int>(threadIdx.x); i < width_; i += kOmpGeneralThreads) {
    if (i >= kept) index_[i] = 0;
    if (p.coef == nullptr) continue;
    double sum = 0.0;
    for (int t = i; t < kept; ++t) sum += inverse_[int64_t{i} * width_ + t] * along_[t];
    p.coef[int64_t{b} * width_ + i] = static_cast<float>(sum * power_of_two(exponent));
  }
  if (threadIdx.x == 0) {
    write_end(p, b, status, kept, static_cast<float>(sqrt(left) * power_of_two(exponent)));
  }
}

__global__ void __launch_bounds__(kOmpGeneralThreads) omp_general_kernel(const OmpJob job) {
  __shared__ General::Shared shared;
  const OmpParams& p = job.asked;
  const int64_t bytes = OmpLayout(p.n_atoms, p.budget_max).bytes;
  General engine(shared, p, p.workspace, blockIdx.x * bytes);
  const int batch = static_cast<int>(p.batch);
  for (int b = static_cast<int>(blockIdx.x); b < batch; b += static_cast<int>(gridDim.x)) {
    const OmpStatus status = pursue(engine, p, b);
    engine.write(p, b, status);
    __syncthreads();  // the next problem overwrites what has been written out
  }
}

}  // namespace csfast::cuda
