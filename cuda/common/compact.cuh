// What one block does with a row of candidates: keep some, in ascending order.
//
// Each warp owns a run of neighbouring positions; it counts what it keeps, learns what the warps
// before it keep, and writes. Two passes and one barrier; no atomic decides an order.
#pragma once

#include <cstdint>

#include "common/warp.cuh"

namespace csfast::cuda {

inline constexpr int kCompactWarps = 32;  // one lane looks up each warp's count
static_assert(kCompactWarps == kWarp);

enum class Choice : int { kDrop, kTie, kKeep };

struct CompactShared {
  int kept[kCompactWarps];
  int tied[kCompactWarps];
  float sum[kCompactWarps];
};

// Calls visit(i, inside) for the positions of the calling warp, one a lane, in the order of i; all
// lanes call it equally often, and `inside` is false beyond the end.
template <typename Visit>
__device__ __forceinline__ void visit_run(int64_t n, Visit visit) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = threadIdx.x / kWarp;
  const int64_t run = (n + kCompactWarps * kWarp - 1) / (kCompactWarps * kWarp) * kWarp;
  const int64_t end = min((warp + 1) * run, n);
  for (int64_t i = warp * run; i < end; i += kWarp) visit(i + lane, i + lane < end);
}

// Keeps the positions of [0, n) that choose(i) keeps and the first `ties` of those that it calls
// tied. Calls emit(i, rank) for each, rank being its place among the kept, or -1 if it is dropped.
// Returns how many were kept, in every thread.
template <typename Choose, typename Emit>
__device__ __forceinline__ int compact(CompactShared& shared, int64_t n, int ties, Choose choose,
                                       Emit emit) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const unsigned below = (1u << lane) - 1;

  // Count
  int kept = 0;
  int tied = 0;
  visit_run(n, [&](int64_t i, bool inside) {
    const Choice choice = inside ? choose(i) : Choice::kDrop;
    kept += __popc(__ballot_sync(kFull, choice == Choice::kKeep));
    tied += __popc(__ballot_sync(kFull, choice == Choice::kTie));
  });
  if (lane == 0) {
    shared.kept[warp] = kept;
    shared.tied[warp] = tied;
  }
  __syncthreads();
  const int kept_all = __reduce_add_sync(kFull, shared.kept[lane]);
  const int tied_all = __reduce_add_sync(kFull, shared.tied[lane]);
  kept = __reduce_add_sync(kFull, lane < warp ? shared.kept[lane] : 0);
  tied = __reduce_add_sync(kFull, lane < warp ? shared.tied[lane] : 0);

  // Write
  visit_run(n, [&](int64_t i, bool inside) {
    const Choice choice = inside ? choose(i) : Choice::kDrop;
    const unsigned keeps = __ballot_sync(kFull, choice == Choice::kKeep);
    const unsigned ties_here = __ballot_sync(kFull, choice == Choice::kTie);
    const int tied_before = tied + __popc(ties_here & below);
    const bool keep = choice == Choice::kKeep || (choice == Choice::kTie && tied_before < ties);
    const int rank = kept + __popc(keeps & below) + min(tied_before, ties);
    if (inside) emit(i, keep ? rank : -1);
    kept += __popc(keeps);
    tied += __popc(ties_here);
  });
  return kept_all + min(tied_all, ties);
}

// The sum of every thread's `v`, in every thread, always in the same order.
__device__ __forceinline__ float block_sum(CompactShared& shared, float v) {
  v = warp_sum(v);
  if (threadIdx.x % kWarp == 0) shared.sum[threadIdx.x / kWarp] = v;
  __syncthreads();
  return warp_sum(shared.sum[threadIdx.x % kWarp]);
}

}  // namespace csfast::cuda
