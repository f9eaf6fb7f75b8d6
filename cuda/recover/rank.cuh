// Where a budget ends: the key of the last usage that it affords, digit by digit.
#pragma once

#include <cstdint>

#include "common/compact.cuh"
#include "common/warp.cuh"

namespace csfast::cuda {

inline constexpr int kRankThreads = kCompactWarps * kWarp;
inline constexpr int kDigitBits = 8;
inline constexpr int kDigits = 1 << kDigitBits;
inline constexpr int kLaneDigits = kDigits / kWarp;  // counts that one lane adds up

struct RankShared {
  int count[kDigits];
  unsigned prefix;  // leading digits of the key where the budget ends
  int left;         // budget not yet spent on keys above the prefix
};

// Orders as the usages do, which are not negative; not-a-number ranks with infinity.
__device__ __forceinline__ unsigned key_of(float usage) {
  return isnan(usage) ? 0x7f800000u : __float_as_uint(usage);
}

// Lowers shared.prefix by one digit: the largest at which the counts from the top reach the budget
// that is left. One warp; each lane has kLaneDigits neighbouring digits, lane 0 the largest.
__device__ __forceinline__ void take_digit(RankShared& shared, int shift) {
  const int lane = static_cast<int>(threadIdx.x);
  const int top = kDigits - 1 - lane * kLaneDigits;
  int own = 0;
#pragma unroll
  for (int i = 0; i < kLaneDigits; ++i) own += shared.count[top - i];
  int through = own;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int other = __shfl_up_sync(kFull, through, offset);
    if (lane >= offset) through += other;
  }
  const int left = shared.left;
  int above = through - own;
  __syncwarp();  // every lane has read `left`
  if (above >= left || through < left) return;
#pragma unroll
  for (int i = 0; i < kLaneDigits; ++i) {
    const int next = above + shared.count[top - i];
    if (above < left && next >= left) {
      shared.prefix |= static_cast<unsigned>(top - i) << shift;
      shared.left = left - above;
    }
    above = next;
  }
}

// Finds the key of the last of n usages that the budget, at least 1 and at most n, affords: in
// shared.prefix, and in shared.left how many of just that key it affords. A block of kRankThreads.
__device__ __forceinline__ void find_last_key(RankShared& shared, const float* usage, int64_t n,
                                              int budget) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    shared.prefix = 0;
    shared.left = budget;
  }
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    if (thread < kDigits) shared.count[thread] = 0;
    __syncthreads();
    const unsigned prefix = shared.prefix;
    for (int64_t j = thread; j < n; j += kRankThreads) {
      const unsigned key = key_of(usage[j]);
      // Two shifts: one by all 32 bits would be undefined.
      const bool same = ((key ^ prefix) >> shift) >> kDigitBits == 0;
      if (same) atomicAdd(&shared.count[key >> shift & (kDigits - 1)], 1);
    }
    __syncthreads();
    if (thread < kWarp) take_digit(shared, shift);
    __syncthreads();  // orders prefix and left, and the counts before they are cleared
  }
}

}  // namespace csfast::cuda
