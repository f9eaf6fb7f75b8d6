// Tile on CUDA: one block per row of the batch.
//
// An entry of the support opens a tile unless the entry before it lies in the same one. Reads and
// writes a few kilobytes; the latency of the one block bounds it.
#include "common/compact.cuh"
#include "common/launch.cuh"
#include "csfast/tile.h"

namespace csfast::cuda {
namespace {

constexpr int kThreads = kCompactWarps * kWarp;

__global__ void __launch_bounds__(kThreads) tile_kernel(const TileParams p) {
  __shared__ CompactShared shared;
  const int64_t b = blockIdx.x;
  const int32_t* index = p.index + b * p.n_neurons;                    // (count)
  int32_t* tile = p.tile + b * n_tiles_max(p.n_neurons, p.tile_rows);  // (n_tiles)
  const int64_t count = min(max(int64_t{p.count[b]}, int64_t{0}), p.n_neurons);

  const auto choose = [&](int64_t i) {
    const bool opens = i == 0 || index[i] / p.tile_rows != index[i - 1] / p.tile_rows;
    return opens ? Choice::kKeep : Choice::kDrop;
  };
  const auto emit = [&](int64_t i, int rank) {
    // A list that does not ascend may open more tiles than there are.
    if (rank >= 0 && rank < n_tiles_max(p.n_neurons, p.tile_rows)) {
      tile[rank] = index[i] / p.tile_rows;
    }
  };
  const int opened = compact(shared, count, 0, choose, emit);
  if (threadIdx.x == 0) {
    p.n_tiles[b] =
        static_cast<int32_t>(min(int64_t{opened}, n_tiles_max(p.n_neurons, p.tile_rows)));
  }
}

}  // namespace

void tile(const TileParams& p, Stream stream) {
  launch("tile", "tile", tile_kernel, dim3(static_cast<unsigned>(p.batch)), dim3(kThreads), stream,
         p);
}

}  // namespace csfast::cuda
