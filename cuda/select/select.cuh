// What compositions need of select and other operations do not see: what one block decides of its
// run of tiles, and lists in pieces.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/async.cuh"
#include "common/launch.cuh"
#include "common/segment.cuh"
#include "csfast/select.h"
#include "recover/usage.cuh"
#include "select/sensing.cuh"
#include "select/sizes.h"

namespace csfast::cuda {

struct RunShared {
  SenseShared sense;
  int kept[kSenseWarps];         // tiles, by warp
  float threshold[kSenseBatch];  // by list
  Votes votes[kSenseBatch];
};
static_assert(sizeof(RunShared) == kRunSharedBytes);

// Of every list, by one warp. `shared` has the scales.
__device__ __forceinline__ void vote(const SelectParams& p, RunShared& shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const float scale = lane < p.batch ? shared.sense.scale[lane] : 0.0f;
  const bool broken = !isfinite(scale);
  if (p.decision.votes == nullptr) {
    if (lane < p.batch) shared.votes[lane] = {.none = false, .all = broken};
    return;
  }
  const bool votes = lane < p.batch && p.decision.votes[lane] != 0.0f;
  const bool any = __any_sync(kFull, votes);
  const bool all = __any_sync(kFull, votes && broken);
  if (lane == 0) shared.votes[0] = {.none = !any, .all = all};
}

// What a block knows of its run.
struct SensedRun {
  int64_t first_tile, end_tile;
  int64_t first;  // neuron
  float* usage;   // (batch, run_neurons)
  int run_neurons;
};

// Brings what the run needs first beside the activations to the L2 cache: codes, as far as
// kPrefetchBytes go, scales, a threshold, and the block's part of the equaliser. Reads nothing, so
// it may come before wait_for_prior(). More codes at once come no sooner: at d = 8192 a selection
// took 57 us instead of 54 (H100) when all of them were asked for.
__device__ __forceinline__ void prefetch_run(const SelectParams& p, const SenseRun& run, int block,
                                             int blocks, int64_t code_bytes) {
  constexpr int kLine = 128;
  const auto thread = static_cast<int>(threadIdx.x);
  const int64_t n = run.end - run.first;
  if (thread == 0 && n > 0) {
    const int64_t bytes = 2 * code_bytes;
    prefetch(p.sensor.codes + run.first * bytes,
             static_cast<int>(min(n * bytes, int64_t{kPrefetchBytes})));
    prefetch_line(p.decision.threshold);
  }
  const int64_t scales = n * int64_t{sizeof(float2)};
  const char* row_scale =
      reinterpret_cast<const char*>(p.sensor.row_scale) + run.first * sizeof(float2);
  for (int64_t i = thread * kLine; i < scales; i += kSenseThreads * kLine) {
    prefetch_line(row_scale + i);
  }
  const int64_t line = int64_t{thread} * blocks + block;
  if (line * kLine < p.form.d * int64_t{sizeof(float)}) {
    prefetch_line(reinterpret_cast<const char*>(p.sensor.equal) + line * kLine);
  }
}

// Senses the block's run of tiles for every row of p.x, at most kSenseBatch; votes are in `shared`
// then. The kernel's first call: lets the next kernel begin, and waits for the one before. bring(q,
// meanwhile) brings the levels of the activations to q (batch, shared_stride) in shared memory and
// calls meanwhile() when what it needs first is on its way: quantize_rows() or copy_rows(). `room`
// is run_bytes() of shared memory for runs of at most run_neurons.
template <Code kCode, int kProducts, typename Bring>
__device__ __forceinline__ SensedRun sense_tiles(const SelectParams& p, const Runs& runs, int block,
                                                 int run_neurons, RunShared& shared, char* room,
                                                 Bring bring) {
  const int batch = static_cast<int>(p.batch);
  const int d = static_cast<int>(p.form.d);
  const int64_t first_tile = runs.begin(block);
  const int64_t end_tile = runs.begin(block + 1);
  int8_t* q = reinterpret_cast<int8_t*>(room);  // (batch, shared_stride)
  float2* row_scale = reinterpret_cast<float2*>(q + batch * shared_stride(kCode, d));
  float* usage = reinterpret_cast<float*>(row_scale + run_neurons);  // (batch, run_neurons)
  const SenseRun run{.codes = p.sensor.codes,
                     .first = first_tile * p.decision.tile_rows,
                     .end = min(end_tile * p.decision.tile_rows, p.form.n_neurons),
                     .batch = batch,
                     .d = d,
                     .q = q};

  const auto n = static_cast<int>(run.end - run.first);
  const auto thread = static_cast<int>(threadIdx.x);
  const float2* row_scales =
      reinterpret_cast<const float2*>(p.sensor.row_scale) + run.first;  // (n)

  launch_dependents();
  if (!p.design.portable) prefetch_run(p, run, block, runs.blocks, row_bytes(d, kCode));

  const auto quantize = [&] {
    wait_for_prior();
    const auto load_scales = [&] {
      for (int i = thread; i < n; i += kSenseThreads) row_scale[i] = row_scales[i];
      const int list = kSenseThreads - 1 - thread;  // by threads without a scale, mostly
      if (list < (p.decision.votes == nullptr ? batch : 1))
        shared.threshold[list] = p.decision.threshold[list];
    };
    bring(q, load_scales);
    if (threadIdx.x < kWarp) vote(p, shared);
  };
  const auto write = [&](int i, int b, int y_gate, int y_up) {
    const int64_t at = 2 * (run.first + i);
    const float scale = shared.sense.scale[b];
    const float gate = scaled(scale, row_scale[i].x, __int2float_rn(y_gate), p.sensor.offset, at);
    const float up = scaled(scale, row_scale[i].y, __int2float_rn(y_up), p.sensor.offset, at + 1);
    usage[b * run_neurons + i] = usage_of(p.form.activation, gate, up);
  };
  sense_run<kCode, kProducts>(run, shared.sense, quantize, write);
  __syncthreads();
  return {.first_tile = first_tile,
          .end_tile = end_tile,
          .first = run.first,
          .usage = usage,
          .run_neurons = run_neurons};
}

struct Kept {
  int count;     // tiles
  float missed;  // sum of the squares of the usages of the others
};

// Of tile t of the run, for `list`.
__device__ __forceinline__ float usage_of_tile(const SelectParams& p, const SensedRun& run,
                                               int list, int64_t t) {
  if (p.decision.votes == nullptr && p.decision.tile_rows == 1) {
    return run.usage[list * run.run_neurons + static_cast<int>(t - run.first)];
  }
  const auto of_row = [&](int64_t b) {
    const float* row = run.usage + b * run.run_neurons - run.first;
    return group_usage(t, p.form.n_neurons, p.decision.tile_rows,
                       [&](int64_t j) { return row[j]; });
  };
  return p.decision.votes == nullptr ? of_row(list)
                                     : joint_usage(p.decision.votes, p.batch, of_row);
}

// Calls keep(t, rank, usage) for every tile of the run; rank counts those that `list` keeps, and is
// -1 for the others. One warp, a lane a tile.
template <typename Keep>
__device__ __forceinline__ Kept keep_tiles(const SelectParams& p, const RunShared& shared,
                                           const SensedRun& run, int list, Keep keep) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const float threshold = shared.threshold[list];
  const Votes votes = shared.votes[list];
  int count = 0;
  float missed = 0.0f;
#pragma unroll 1
  for (int64_t t0 = run.first_tile; t0 < run.end_tile; t0 += kWarp) {
    const int64_t t = t0 + lane;
    const bool inside = t < run.end_tile;
    const float usage = inside ? usage_of_tile(p, run, list, t) : 0.0f;
    const bool is_in = inside && is_kept(usage, threshold, votes);
    const unsigned keeps = __ballot_sync(kFull, is_in);
    const int rank = is_in ? count + __popc(keeps & ((1u << lane) - 1)) : -1;
    if (inside) keep(t, rank, usage);
    if (inside && !is_in) missed = __fmaf_rn(usage, usage, missed);
    count += __popc(keeps);
  }
  return {.count = count, .missed = warp_sum(missed)};
}

// The same for a single list by the whole block, a thread a tile: what a warp takes one after the
// other is at once here. Threads have the count, the first warp also what was missed, in the same
// order of sums; `shared` may be written after a barrier. Usages of the run are of no account then.
template <typename Keep>
__device__ __forceinline__ Kept keep_list(const SelectParams& p, RunShared& shared,
                                          const SensedRun& run, Keep keep) {
  const auto thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const float threshold = shared.threshold[0];
  const Votes votes = shared.votes[0];
  const auto place_of = [&](int64_t t) { return t * p.decision.tile_rows - run.first; };
  int count = 0;
#pragma unroll 1
  for (int64_t t0 = run.first_tile; t0 < run.end_tile; t0 += kSenseThreads) {
    const int64_t t = t0 + thread;
    const bool inside = t < run.end_tile;
    const float usage = inside ? usage_of_tile(p, run, 0, t) : 0.0f;
    if (inside) run.usage[place_of(t)] = usage;  // of the tile, which nobody else looks at
    const bool is_in = inside && is_kept(usage, threshold, votes);
    const unsigned keeps = __ballot_sync(kFull, is_in);
    if (t0 > run.first_tile) __syncthreads();  // the counts before have been read
    if (lane == 0) shared.kept[warp] = __popc(keeps);
    __syncthreads();
    const int of_warp = shared.kept[lane % kSenseWarps];
    const int before = __reduce_add_sync(kFull, lane < warp ? of_warp : 0);
    const int all = __reduce_add_sync(kFull, lane < kSenseWarps ? of_warp : 0);
    const int rank = is_in ? count + before + __popc(keeps & ((1u << lane) - 1)) : -1;
    if (inside) keep(t, rank, usage);
    count += all;
  }
  if (p.missed == nullptr || warp > 0) return {.count = count, .missed = 0.0f};
  float missed = 0.0f;
  for (int64_t t = run.first_tile + lane; t < run.end_tile; t += kWarp) {
    const float usage = run.usage[place_of(t)];
    if (!is_kept(usage, threshold, votes)) missed = __fmaf_rn(usage, usage, missed);
  }
  return {.count = count, .missed = warp_sum(missed)};
}

// select() as `chosen`, which choose() made of p.
void select_chosen(const SelectParams& p, const ChosenSelect& chosen, const Queue& queue);

// The same without its outputs, in one pass: the tiles stay in the workspace, in the pieces that
// are returned.
Segments select_segments(const SelectParams& p, const ChosenSelect& chosen, const Queue& queue);

}  // namespace csfast::cuda
