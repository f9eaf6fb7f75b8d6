// What compositions need of execute and other operations do not see: lists in pieces, counters, and
// a block's share of an output without execute's own kernel.
#pragma once

#include "common/launch.cuh"
#include "common/segment.cuh"
#include "csfast/execute.h"
#include "execute/gather.cuh"

namespace csfast::cuda {

// How many there are of n places. By one warp.
__device__ __forceinline__ int neurons_of(const int32_t* neurons, int n) {
  int there = 0;
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < n; i += kWarp) there += neurons[i] >= 0;
  return __reduce_add_sync(kFull, there);
}

template <typename T>
__device__ __forceinline__ Gather gather_of(const ExecuteParams& p, const int32_t* neurons,
                                            int count, int group_threads) {
  return {.gate = static_cast<const char*>(p.weights.gate),
          .up = static_cast<const char*>(p.weights.up),
          .down_t = static_cast<const char*>(p.weights.down_t),
          .gate_bias = p.weights.gate_bias,
          .up_bias = p.weights.up_bias,
          .neurons = neurons,
          .count = count,
          .row_bytes = static_cast<int>(p.form.d) * int{sizeof(T)},
          .group_threads = group_threads,
          .activation = p.form.activation};
}

// Whose list execute takes: p.tile and p.n_tiles, or pieces; and who counts.
struct Listing {
  Segments segments = {};  // of p.form.n_neurons and p.tile_rows; without blocks p.tile is the list
  int64_t* stats = nullptr;  // (2) or null: += batch, += neurons executed, in all its rows
};

// execute() as `chosen`, which choose() made of p. On kGeneral there are neither pieces nor stats.
void execute_chosen(const ExecuteParams& p, const Chosen& chosen, const Listing& listing,
                    const Queue& queue);

// In the workspace: what blocks leave of rows that share a list, and how many neurons they
// executed.
struct Partials {
  float* sum;         // (batch, blocks, d)
  int32_t* executed;  // (blocks), if someone counts
};
Partials partials_of(const ExecuteParams& p);

// The end of execute() for p.batch rows with one list: adds up what chosen.blocks blocks have left
// in partials_of(p). 16-bit types.
void sum_partials(const ExecuteParams& p, const Chosen& chosen, int64_t* stats, const Queue& queue);

}  // namespace csfast::cuda
