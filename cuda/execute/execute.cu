// Execute on CUDA: partial outputs of shares of the list, then their sum.
//
// Reads gate, up and down_t of the listed neurons once, 3 * d elements a neuron, which bounds it.
//
// - gather: one block a share of the list, activations and their down rows at once, see gather.cuh.
// - sum: adds the shares up, in their order.
//
// That is for 16-bit rows at multiples of 16 bytes, up to 8,192 wide. Rows of a batch that share a
// list have two kernels in the place of gather, activate_rows and combine_rows, see rows.cuh. The
// general path has three kernels and activations in memory between them:
//
// - activate: one warp a neuron; x in shared memory, weights straight to registers.
// - combine: one block a strip of columns and share of the list, of which each warp takes every
//   eighth neuron.
// - sum: as above.
//
// If a row of the weights or of x begins off a multiple of 16 bytes, all go by single elements.
// Shares are counted from the sizes of one row, so a row's result does not depend on its batch.
#include <type_traits>

#include "common/activate.cuh"
#include "common/async.cuh"
#include "common/device.cuh"
#include "common/dispatch.cuh"
#include "common/launch.cuh"
#include "common/shared.cuh"
#include "common/vector.cuh"
#include "common/warp.cuh"
#include "common/workspace.h"
#include "execute/execute.cuh"
#include "execute/gather.cuh"
#include "execute/rows.cuh"

namespace csfast::cuda {
namespace {

constexpr int kActivateWarps = 4;      // a block: small ones, so that a short list has many
constexpr int kActivateBlocks = 4096;  // at most, of all rows; those beyond a list end at once
constexpr int kCombineWarps = 8;       // a block: 256 threads, eight blocks fill an SM of 2048
constexpr int kSumWarps = kOverlapThreads / kWarp;                    // a block, of 32 columns
constexpr int kSumShares = (kBlocksMax + kSumWarps - 1) / kSumWarps;  // of a warp, at most
constexpr int kRowsAtOnce = 16;  // of the batch, in one launch of gather: the workspace has room
constexpr int kUnroll = 4;       // loads of 16 bytes that a lane has in flight, a matrix
constexpr int kPanel = 4096;     // channels of x in shared memory: 16 KB at most

// Shares of the list: about 512 blocks of combine, four on each of 128 SMs, for strips of 256
// columns; no more than 32, whose partial sums, written and read, are as many bytes as 128 rows of
// 16-bit weights; about 32 neurons each or more when the list is full.
constexpr int64_t shares_of(int64_t d, int64_t n_neurons) {
  const int64_t wanted = 512 / ((d + 255) / 256);
  const int64_t most = (n_neurons + 31) / 32 < 32 ? (n_neurons + 31) / 32 : 32;
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

// Where the parts of the workspace begin, and its size. The paths share it.
struct Layout {
  int64_t activation;         // of kGeneral: (batch, n_neurons), float; written where listed
  int64_t partial;            // of kGeneral: (batch, shares, d), float
  int64_t sum;                // of others: (rows, blocks, d), float
  int64_t executed;           // of others: (rows, blocks), int32
  int64_t shared_activation;  // of kBatch: SplitActivations or less, by place in the list
  int64_t bytes;
};

constexpr Layout layout_of(int64_t batch, int64_t d, int64_t n_neurons) {
  const int64_t partial = padded(batch * n_neurons * int64_t{sizeof(float)});
  const int64_t shares = shares_of(d, n_neurons);
  const int64_t general = partial + padded(batch * shares * d * int64_t{sizeof(float)});
  const int64_t rows = batch < kRowsAtOnce ? batch : kRowsAtOnce;
  const int64_t executed = padded(rows * kBlocksMax * d * int64_t{sizeof(float)});
  const int64_t shared_activation = executed + padded(rows * kBlocksMax * int64_t{sizeof(int32_t)});
  // A last tile with fewer neurons takes as many places as the others, of at most n_neurons.
  const int64_t others =
      shared_activation + padded(2 * n_neurons * int64_t{sizeof(SplitActivations<kProductsMax>)});
  return {.activation = 0,
          .partial = partial,
          .sum = 0,
          .executed = executed,
          .shared_activation = shared_activation,
          .bytes = general > others ? general : others};
}

// The neurons of one row's tile list, by position: tile_rows to a tile.
struct TileList {
  const int32_t* tile;  // (n_tiles)
  int64_t count;        // of positions
  int64_t n_neurons;
  int tile_rows;

  __device__ TileList(const ExecuteParams& p, int64_t b)
      : n_neurons(p.form.n_neurons), tile_rows(p.tile_rows) {
    const int64_t list = p.shared ? 0 : b;
    const int64_t most = n_tiles_max(p.form.n_neurons, p.tile_rows);
    tile = p.tile + list * most;
    count = min(max(int64_t{p.n_tiles[list]}, int64_t{0}), most) * tile_rows;
  }

  // The neuron, or -1 at positions past the last neuron or the end of the list. So is a tile that
  // does not exist: the list came from the caller, and nobody looked at it on the host.
  __device__ __forceinline__ int64_t neuron(int64_t position) const {
    if (position >= count) return -1;
    const unsigned i = static_cast<unsigned>(position);
    const unsigned rows = static_cast<unsigned>(tile_rows);
    const int64_t j = int64_t{tile[i / rows]} * tile_rows + i % rows;
    return j < 0 || j >= n_neurons ? -1 : j;
  }
};

// Adds the calling lane's share of the dot products of x with a gate and an up row, n channels.
template <typename T, bool kAligned>
__device__ __forceinline__ void dot_rows(const T* gate, const T* up, const T* x, int n, float& g,
                                         float& u) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if constexpr (kAligned) {
    for (int c0 = lane * kVector<T>; c0 < n; c0 += kUnroll * kStrip<T>) {
      Vector<T> gates[kUnroll];
      Vector<T> ups[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        const int c = c0 + k * kStrip<T>;
        if (c < n) {
          gates[k] = load_vector(gate + c);
          ups[k] = load_vector(up + c);
        }
      }
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        const int c = c0 + k * kStrip<T>;
        if (c >= n) continue;
        const Vector<T> xs = *reinterpret_cast<const Vector<T>*>(x + c);
#pragma unroll
        for (int v = 0; v < kVector<T>; ++v) {
          g = fmaf(static_cast<float>(gates[k].at[v]), static_cast<float>(xs.at[v]), g);
          u = fmaf(static_cast<float>(ups[k].at[v]), static_cast<float>(xs.at[v]), u);
        }
      }
    }
  } else {
    for (int c = lane; c < n; c += kWarp) {
      g = fmaf(static_cast<float>(gate[c]), static_cast<float>(x[c]), g);
      u = fmaf(static_cast<float>(up[c]), static_cast<float>(x[c]), u);
    }
  }
}

// z + entry i of bias, unless that is null.
template <typename T>
__device__ __forceinline__ float add_bias(float z, const void* bias, int64_t i) {
  return bias == nullptr ? z : z + static_cast<float>(static_cast<const T*>(bias)[i]);
}

template <typename T, bool kAligned>
__device__ __forceinline__ void load_panel(T* to, const T* from, int n) {
  constexpr int kStep = kAligned ? kVector<T> : 1;
  for (int i = static_cast<int>(threadIdx.x) * kStep; i < n; i += kActivateWarps * kWarp * kStep) {
    if constexpr (kAligned) {
      *reinterpret_cast<Vector<T>*>(to + i) = load_vector(from + i);
    } else {
      to[i] = from[i];
    }
  }
}

// A block walks over the row's list with the stride of all the blocks of the row.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kActivateWarps* kWarp, 4) activate_kernel(const ExecuteParams p) {
  struct Shared {
    alignas(16) T x[kPanel];
  };
  __shared__ Shared shared;
  const int64_t b = blockIdx.y;
  const int64_t stride = int64_t{gridDim.x} * kActivateWarps;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const T* x = static_cast<const T*>(p.x) + b * p.form.d;  // (d)
  const TileList listed(p, b);
  float* activation =
      at<float>(p.workspace, layout_of(p.batch, p.form.d, p.form.n_neurons).activation) +
      b * p.form.n_neurons;

  bool loaded = false;
  for (int64_t first = int64_t{blockIdx.x} * kActivateWarps; first < listed.count;
       first += stride) {
    const int64_t j = listed.neuron(first + warp);
    const T* gate =
        static_cast<const T*>(p.weights.gate) + j * p.form.d;  // (d), of no meaning for j < 0
    const T* up = static_cast<const T*>(p.weights.up) + j * p.form.d;
    float g = 0.0f;
    float u = 0.0f;
    for (int64_t c = 0; c < p.form.d; c += kPanel) {
      const int width = static_cast<int>(min(p.form.d - c, int64_t{kPanel}));
      if (!loaded || p.form.d > kPanel) {
        __syncthreads();  // the warps are done with the panel before
        load_panel<T, kAligned>(shared.x, x + c, width);
        __syncthreads();
        loaded = true;
      }
      if (j >= 0) dot_rows<T, kAligned>(gate + c, up + c, shared.x, width, g, u);
    }
    g = warp_sum(g);
    u = warp_sum(u);
    if (threadIdx.x % kWarp == 0 && j >= 0) {
      activation[j] = activate(p.form.activation, add_bias<T>(g, p.weights.gate_bias, j)) *
                      add_bias<T>(u, p.weights.up_bias, j);
    }
  }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kCombineWarps* kWarp, 3) combine_kernel(const ExecuteParams p) {
  // By warp, element of the vector and lane; the one spare lane spreads the columns over the banks
  // when a strip is read in their order.
  struct Shared {
    float sum[kCombineWarps][kVector<T>][kWarp + 1];
  };
  __shared__ Shared shared;
  const int64_t b = blockIdx.z;
  const int64_t share = blockIdx.y;
  const int64_t shares = gridDim.y;
  const int64_t first_column = int64_t{blockIdx.x} * kStrip<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const Layout layout = layout_of(p.batch, p.form.d, p.form.n_neurons);
  const float* activation = at<float>(p.workspace, layout.activation) + b * p.form.n_neurons;
  float* partial = at<float>(p.workspace, layout.partial) + (b * shares + share) * p.form.d;  // (d)
  const T* down_t = static_cast<const T*>(p.weights.down_t) + first_column;
  const int width = static_cast<int>(min(p.form.d - first_column, int64_t{kStrip<T>}));
  const TileList listed(p, b);
  const int64_t begin = listed.count * share / shares;
  const int64_t end = listed.count * (share + 1) / shares;

  float sum[kVector<T>] = {};
  for (int64_t first = begin + warp; first < end; first += kUnroll * kCombineWarps) {
    Vector<T> rows[kUnroll];
    float scale[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int64_t position = first + k * kCombineWarps;
      const int64_t j = position < end ? listed.neuron(position) : -1;
      scale[k] = j < 0 ? 0.0f : activation[j];
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v) rows[k].at[v] = static_cast<T>(0.0f);
      if (j < 0) continue;
      const T* row = down_t + j * p.form.d;
      if constexpr (kAligned) {
        if (lane * kVector<T> < width) rows[k] = load_vector(row + lane * kVector<T>);
      } else {
#pragma unroll
        for (int v = 0; v < kVector<T>; ++v) {
          if (v * kWarp + lane < width) rows[k].at[v] = row[v * kWarp + lane];
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v) {
        sum[v] = fmaf(scale[k], static_cast<float>(rows[k].at[v]), sum[v]);
      }
    }
  }

#pragma unroll
  for (int v = 0; v < kVector<T>; ++v) shared.sum[warp][v][lane] = sum[v];
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < width; i += kCombineWarps * kWarp) {
    const int v = kAligned ? i % kVector<T> : i / kWarp;
    const int from = kAligned ? i / kVector<T> : i % kWarp;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kCombineWarps; ++w) total += shared.sum[w][v][from];
    partial[first_column + i] = total;
  }
}

struct SumParams {
  const void* down_bias;    // (d), T, or null
  const float* partial;     // (batch, shares, d)
  const int32_t* executed;  // (lists, n_counts), neurons in parts; looked at if someone counts
  void* out;                // (batch, d), T, written
  int64_t* stats;           // as in Listing
  int64_t batch, d;
  int shares, n_counts;
  bool shared;
};

// By one warp.
__device__ __forceinline__ void count(const SumParams& p) {
  int64_t neurons = 0;
  const int64_t n = (p.shared ? 1 : p.batch) * p.n_counts;
  for (int64_t i = threadIdx.x % kWarp; i < n; i += kWarp) neurons += p.executed[i];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    neurons += __shfl_xor_sync(kFull, neurons, offset);
  }
  if (threadIdx.x % kWarp > 0) return;
  p.stats[0] += p.batch;
  p.stats[1] += p.shared ? p.batch * neurons : neurons;
}

template <typename T>
__global__ void __launch_bounds__(kOverlapThreads, kOverlapBlocks) sum_kernel(const SumParams p) {
  struct Shared {
    float sum[kSumWarps][kWarp];
  };
  __shared__ Shared shared;
  const int64_t b = blockIdx.y;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t column = int64_t{blockIdx.x} * kWarp + lane;
  const float* partial = p.partial + b * p.shares * p.d + column;  // (shares, d)
  launch_dependents();
  wait_for_prior();

  // Load
  float part[kSumShares];
#pragma unroll
  for (int i = 0; i < kSumShares; ++i) {
    const int s = warp + i * kSumWarps;
    part[i] = s < p.shares && column < p.d ? partial[s * p.d] : 0.0f;
  }

  // Add
  float sum = part[0];
#pragma unroll
  for (int i = 1; i < kSumShares; ++i) sum += part[i];
  shared.sum[warp][lane] = sum;
  __syncthreads();
  if (warp == 1 && b == 0 && blockIdx.x == 0 && p.stats != nullptr) count(p);
  if (warp > 0 || column >= p.d) return;
#pragma unroll
  for (int w = 1; w < kSumWarps; ++w) sum += shared.sum[w][lane];
  static_cast<T*>(p.out)[b * p.d + column] = static_cast<T>(add_bias<T>(sum, p.down_bias, column));
}

template <typename T>
void launch_sum(const SumParams& p, bool overlaps, const Queue& queue) {
  launch("execute", "sum", sum_kernel<T>,
         dim3(blocks_of(p.d, kWarp), static_cast<unsigned>(p.batch)), dim3(kOverlapThreads), queue,
         p, {.overlaps = overlaps, .out = &p.out});
}

struct GatherParams {
  ExecuteParams p;  // of at most kRowsAtOnce rows
  Chosen chosen;
  Segments segments;
  float* partial;     // (batch, blocks, d), written
  int32_t* executed;  // (lists, blocks), written, or null
};

// The part of a list that a block lists for itself.
struct Share {
  Path path;
  int block, blocks;
  int room;         // neurons
  bool is_strided;  // of kList: every blocks-th position, from `block` on; else neighbours
};

struct Listed {
  int64_t first;  // place in the list
  int count;      // of places, that follow unless they are strided
};

struct ShareShared {
  int before[kBlocksMax + 1];  // tiles of the pieces before
  int from;                    // of the list: the first tile of a run
  int to;                      // and the first beyond it
};

// How many of n ascending tiles are below `limit`. One warp; every lane gets it.
__device__ __forceinline__ int tiles_below(const int32_t* tile, int n, int64_t limit) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int low = 0;  // so many are, for sure
  int high = n;
  while (low < high) {
    const int step = (high - low + kWarp - 1) / kWarp;
    const int i = low + lane * step + step - 1;  // the last of the lane's part
    const bool is_below = i < high && __ldcg(tile + i) < limit;
    const int parts = __popc(__ballot_sync(kFull, is_below));
    low += parts * step;
    high = min(high, low + step - 1);
  }
  return low;
}

// Lists the neurons of a share in `neurons`, (room), -1 where a tile has none; returns which
// places these are. The whole block calls; the list may be read at once. It is read past the L1
// cache, as combine_rows calls before it waits for the kernel before it.
__device__ __forceinline__ Listed list_share(const ExecuteParams& p, const Segments& segments,
                                             const Share& share, ShareShared& shared,
                                             int32_t* neurons) {
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const int64_t list = p.shared ? 0 : blockIdx.y;
  const int64_t most = n_tiles_max(p.form.n_neurons, p.tile_rows);
  const int pieces = segments.blocks;
  const int32_t* tile = (pieces > 0 ? segments.tile : p.tile) + list * most;
  const int32_t* piece_tiles = segments.count + list * pieces;  // (pieces), if there are any
  const auto rows = static_cast<unsigned>(p.tile_rows);

  // Where to look does not depend on how many there are, if places are strided: what is there may
  // come at the same time.
  const auto place_of = [&](int64_t from, int i) {
    return share.is_strided ? share.block + int64_t{i} * share.blocks : from + i;
  };
  int32_t tile_ahead = 0;
  const bool is_ahead = share.is_strided && pieces == 0 && thread < share.room;
  if (is_ahead) {
    const auto at = static_cast<unsigned>(place_of(0, thread)) / rows;
    if (at < most) tile_ahead = __ldcg(tile + at);
  }

  int64_t first = 0;  // position in the list
  int64_t end = 0;
  if (share.path == Path::kRange) {
    const Runs runs = Runs::of(p.form.n_neurons, p.tile_rows, share.blocks);
    if (pieces > 0) {  // as many as blocks, so this is the block's
      tile += runs.begin(share.block);
      end = int64_t{piece_tiles[share.block]} * p.tile_rows;
    } else {
      const auto n = static_cast<int>(min(max(int64_t{p.n_tiles[list]}, int64_t{0}), most));
      if (warp < 2) {
        const int below = tiles_below(tile, n, runs.begin(share.block + warp));
        if (lane == 0) (warp == 0 ? shared.from : shared.to) = below;
      }
      __syncthreads();
      first = int64_t{shared.from} * p.tile_rows;
      end = int64_t{shared.to} * p.tile_rows;
    }
    end = max(min(end, first + share.room), first);  // of a list that does not ascend
  } else {
    int64_t n = 0;
    if (pieces > 0) {
      if (warp == 0) {
        int counts[kBlocksMax / kWarp];
#pragma unroll
        for (int k = 0; k < kBlocksMax / kWarp; ++k) {
          const int i = k * kWarp + lane;
          counts[k] = i < pieces ? __ldcg(piece_tiles + i) : 0;
        }
        int total = 0;
#pragma unroll
        for (int k = 0; k < kBlocksMax / kWarp; ++k) {
          int through = counts[k];
#pragma unroll
          for (int offset = 1; offset < kWarp; offset *= 2) {
            const int other = __shfl_up_sync(kFull, through, offset);
            if (lane >= offset) through += other;
          }
          const int i = k * kWarp + lane;
          if (i < pieces) shared.before[i + 1] = total + through;
          total += __shfl_sync(kFull, through, kWarp - 1);
        }
        if (lane == 0) shared.before[0] = 0;
      }
      __syncthreads();
      n = shared.before[pieces];
    } else {
      n = min(max(int64_t{__ldcg(p.n_tiles + list)}, int64_t{0}), most);
    }
    const int64_t places = n * p.tile_rows;
    if (share.is_strided) {
      end = max((places - share.block + share.blocks - 1) / share.blocks, int64_t{0});
    } else {
      first = places * share.block / share.blocks;
      end = places * (share.block + 1) / share.blocks;
    }
  }

  const auto count = static_cast<int>(end - first);
  const Runs runs = Runs::of(p.form.n_neurons, p.tile_rows, max(pieces, 1));
  for (int i = thread; i < count; i += static_cast<int>(blockDim.x)) {
    const auto position = static_cast<unsigned>(place_of(first, i));
    int64_t at = position / rows;
    if (pieces > 0 && share.path != Path::kRange) {
      int piece = 0;  // the last one that begins at or before `at`
      for (int step = 128; step > 0; step /= 2) {
        if (piece + step < pieces && shared.before[piece + step] <= at) piece += step;
      }
      at += runs.begin(piece) - shared.before[piece];
    }
    const int32_t t = is_ahead && i == thread ? tile_ahead : __ldcg(tile + at);
    const int64_t j = int64_t{t} * p.tile_rows + position % rows;
    neurons[i] = j < 0 || j >= p.form.n_neurons ? -1 : static_cast<int32_t>(j);
  }
  __syncthreads();
  return {.first = first, .count = count};
}

template <int kVectors, bool kBulk>
constexpr int kGatherBytes = kBulk ? kRingBytes<kVectors> : kSumBytes<kVectors>;

template <typename T, int kVectors, bool kBulk>
__global__ void __maxnreg__(kOverlapRegisters) gather_kernel(const GatherParams params) {
  constexpr int kAtOnce = kBulk ? kBulkNeurons<kVectors> : kRegisterNeurons<kVectors>;
  struct Shared {
    GatherShared<kAtOnce> gather;
    typename OwnX<kVectors>::Shared x;
    ShareShared share;
    alignas(8) Arrival arrival[kSlots];
  };
  static_assert(sizeof(Shared) + kGatherBytes<kVectors, kBulk> <=
                kGatherOtherBytes + (kBulk ? kRingBytes<kVectors> : 0));
  __shared__ Shared shared;
  const ExecuteParams& p = params.p;
  const int64_t b = blockIdx.y;
  const int64_t block = blockIdx.x;
  char* ring = dynamic_shared();
  int32_t* neurons = reinterpret_cast<int32_t*>(ring + kGatherBytes<kVectors, kBulk>);
  launch_dependents();
  if (kBulk && threadIdx.x == 0) init_arrivals(shared.arrival, kSlots);
  wait_for_prior();

  // List
  const Share share{.path = params.chosen.path,
                    .block = static_cast<int>(blockIdx.x),
                    .blocks = params.chosen.blocks,
                    .room = params.chosen.list_room,
                    .is_strided = params.chosen.path == Path::kList};
  const int count = list_share(p, params.segments, share, shared.share, neurons).count;
  const int64_t list = p.shared ? 0 : b;
  if (params.executed != nullptr && threadIdx.x < kWarp && b == list) {
    const int there = neurons_of(neurons, count);
    if (threadIdx.x == 0) params.executed[list * params.chosen.blocks + block] = there;
  }

  // Gather
  const Gather gather = gather_of<T>(p, neurons, count, params.chosen.group_threads);
  const Place place(params.chosen.group_threads);
  OwnX<kVectors> x{shared.x};
  load_x(gather, place, static_cast<const T*>(p.x) + b * p.form.d, x);
  float sum[kVectors][kLaneColumns] = {};
  if constexpr (kBulk) {
    gather_bulk<T, kVectors>(gather, place, shared.gather, shared.arrival, ring, x, sum);
  } else {
    gather_register<T, kVectors>(gather, place, shared.gather, x, sum);
  }
  write_partial<kVectors>(gather, place, sum, reinterpret_cast<float*>(ring),
                          params.partial + (b * params.chosen.blocks + block) * p.form.d);
}

template <typename T, int kVectors>
void launch_gather(const GatherParams& params, const Queue& queue) {
  const bool is_bulk = params.chosen.loads == Loads::kBulk;
  const auto kernel =
      is_bulk ? gather_kernel<T, kVectors, true> : gather_kernel<T, kVectors, false>;
  const int bytes = is_bulk ? kGatherBytes<kVectors, true> : kGatherBytes<kVectors, false>;
  launch("execute", "gather", kernel,
         dim3(static_cast<unsigned>(params.chosen.blocks), static_cast<unsigned>(params.p.batch)),
         dim3(kGatherThreads), queue, params,
         {.shared_bytes = bytes + params.chosen.list_room * int{sizeof(int32_t)},
          .overlaps = params.chosen.overlaps,
          .x = &params.p.x});
}

struct RowsParams {
  ExecuteParams p;  // of at most kRowsAtOnce rows
  Chosen chosen;
  Segments segments;
  void* activation;   // by place in the list, see rows.cuh
  float* partial;     // (batch, shares, d)
  int32_t* executed;  // (blocks), written, or null
};

// Bytes of shared memory that a block of either kernel has beside its list, at most.
template <bool kBulk>
constexpr size_t kRowsRoom = kBulk ? kRowsBulkBytes : kRowsBytes;
// Registers of a thread of combine_rows: of a block of 512 so few that a block of sum has room.
template <bool kBulk>
constexpr int kCombineRegisters = kBulk ? kOverlapRegisters : 255;
template <bool kBulk>
constexpr int kCombineThreads = kBulk ? kCombineBulkThreads : kCombineRegisterThreads;

template <typename T, int kProducts, bool kBulk>
__global__ void __launch_bounds__(kGatherThreads, 1) activate_rows_kernel(const RowsParams params) {
  using Rows = std::conditional_t<kBulk, ActivateBulk<kProducts>, ActivateRegister<kProducts>>;
  static_assert(sizeof(Rows) + sizeof(ShareShared) <= kRowsRoom<kBulk>);
  __shared__ ShareShared shared;
  const ExecuteParams& p = params.p;
  const auto block = static_cast<int>(blockIdx.x);
  Rows& rows = *reinterpret_cast<Rows*>(dynamic_shared());
  int32_t* neurons = reinterpret_cast<int32_t*>(&rows + 1);
  if constexpr (kBulk) {
    if (threadIdx.x == 0) rows.init();
  }
  wait_for_prior();
  // Not before: combine_rows reads the list as soon as it begins, so whoever wrote that must have
  // ended, as it has where this wait returns, before the last block here says that it may begin.
  launch_dependents();
  const Share share{.path = Path::kList,
                    .block = block,
                    .blocks = params.chosen.blocks,
                    .room = params.chosen.list_room,
                    .is_strided = false};
  const Listed listed = list_share(p, params.segments, share, shared, neurons);
  if (params.executed != nullptr && threadIdx.x < kWarp) {
    const int there = neurons_of(neurons, listed.count);
    if (threadIdx.x == 0) params.executed[block] = there;
  }
  const Gather gather = gather_of<T>(p, neurons, listed.count, 0);
  const auto batch = static_cast<int>(p.batch);
  if constexpr (kBulk) {
    activate_bulk<T>(gather, p.x, batch, rows, listed.first,
                     static_cast<SplitActivations<kProducts>*>(params.activation));
  } else {
    activate_register<T>(gather, p.x, batch, rows,
                         static_cast<float*>(params.activation) + listed.first * kActivationStride);
  }
}

template <typename T, int kProducts, bool kBulk>
__global__ void __maxnreg__(kCombineRegisters<kBulk>) combine_rows_kernel(const RowsParams params) {
  static_assert((kBulk ? sizeof(CombineBulk<kProducts>) : 0) + sizeof(ShareShared) <=
                kRowsRoom<kBulk>);
  __shared__ ShareShared shared;
  const ExecuteParams& p = params.p;
  const int64_t block = blockIdx.y;
  const int first_column = static_cast<int>(blockIdx.x) * kCombineColumns;
  using Ring = CombineBulk<kProducts>;
  Ring& ring = *reinterpret_cast<Ring*>(dynamic_shared());  // if kBulk
  int32_t* neurons = reinterpret_cast<int32_t*>(&ring + (kBulk ? 1 : 0));
  launch_dependents();
  if (kBulk && threadIdx.x == 0) ring.init();
  const Share share{.path = Path::kList,
                    .block = static_cast<int>(block),
                    .blocks = params.chosen.shares,
                    .room = params.chosen.list_room,
                    .is_strided = false};
  const Listed listed = list_share(p, params.segments, share, shared, neurons);
  const Gather gather = gather_of<T>(p, neurons, listed.count, 0);
  const auto batch = static_cast<int>(p.batch);
  float* partial = params.partial + block * p.form.d;
  const int64_t stride = params.chosen.shares * p.form.d;
  if constexpr (kBulk) {
    combine_bulk<T>(gather, listed.first,
                    static_cast<const SplitActivations<kProducts>*>(params.activation), batch,
                    first_column, ring, partial, stride);
  } else {
    wait_for_prior();
    combine_register<T, kProducts>(
        gather, static_cast<const float*>(params.activation) + listed.first * kActivationStride,
        batch, first_column, partial, stride);
  }
}

template <typename T, int kProducts, bool kBulk>
void launch_rows(const RowsParams& params, const Queue& queue) {
  using Rows = std::conditional_t<kBulk, ActivateBulk<kProducts>, ActivateRegister<kProducts>>;
  const auto with = [&](size_t bytes) -> Launch {
    bytes += static_cast<size_t>(params.chosen.list_room) * sizeof(int32_t);
    return {.shared_bytes = static_cast<int>(bytes),
            .overlaps = params.chosen.overlaps,
            .x = &params.p.x};
  };
  launch("execute", "activate_rows", activate_rows_kernel<T, kProducts, kBulk>,
         dim3(static_cast<unsigned>(params.chosen.blocks)), dim3(kGatherThreads), queue, params,
         with(sizeof(Rows)));
  launch("execute", "combine_rows", combine_rows_kernel<T, kProducts, kBulk>,
         dim3(blocks_of(params.p.form.d, kCombineColumns),
              static_cast<unsigned>(params.chosen.shares)),
         dim3(kCombineThreads<kBulk>), queue, params,
         with(kBulk ? sizeof(CombineBulk<kProducts>) : 0));
}

template <typename T, bool kBulk>
void launch_rows(const RowsParams& params, const Queue& queue) {
  params.p.batch <= kProductRows ? launch_rows<T, 1, kBulk>(params, queue)
                                 : launch_rows<T, kProductsMax, kBulk>(params, queue);
}

// Rows first .. first + rows - 1 of the batch, by kBatch.
template <typename T>
void multiply_rows(const ExecuteParams& p, const Chosen& chosen, const Listing& listing,
                   int64_t first, int64_t rows, const Queue& queue) {
  const Layout layout = layout_of(p.batch, p.form.d, p.form.n_neurons);
  RowsParams params{
      .p = p,
      .chosen = chosen,
      .segments = listing.segments,
      .activation = at<char>(p.workspace, layout.shared_activation),
      .partial = at<float>(p.workspace, layout.sum),
      .executed = listing.stats == nullptr ? nullptr : at<int32_t>(p.workspace, layout.executed)};
  params.p.batch = rows;
  params.p.x = static_cast<const T*>(p.x) + first * p.form.d;
  chosen.loads == Loads::kBulk ? launch_rows<T, true>(params, queue)
                               : launch_rows<T, false>(params, queue);
  launch_sum<T>({.down_bias = p.weights.down_bias,
                 .partial = params.partial,
                 .executed = params.executed,
                 .out = static_cast<T*>(p.out) + first * p.form.d,
                 .stats = listing.stats,
                 .batch = rows,
                 .d = p.form.d,
                 .shares = chosen.shares,
                 .n_counts = chosen.blocks,
                 .shared = true},
                chosen.overlaps, queue);
}

// Rows first .. first + rows - 1 of the batch, by kList or kRange.
template <typename T>
void gather_rows(const ExecuteParams& p, const Chosen& chosen, const Listing& listing,
                 int64_t first, int64_t rows, const Queue& queue) {
  const Layout layout = layout_of(p.batch, p.form.d, p.form.n_neurons);
  const int64_t most = n_tiles_max(p.form.n_neurons, p.tile_rows);
  GatherParams params{
      .p = p,
      .chosen = chosen,
      .segments = listing.segments,
      .partial = at<float>(p.workspace, layout.sum),
      .executed = listing.stats == nullptr ? nullptr : at<int32_t>(p.workspace, layout.executed)};
  params.p.batch = rows;
  params.p.x = static_cast<const T*>(p.x) + first * p.form.d;
  if (!p.shared && params.segments.blocks > 0) {
    params.segments.tile += first * most;
    params.segments.count += first * params.segments.blocks;
  } else if (!p.shared) {
    params.p.tile += first * most;
    params.p.n_tiles += first;
  }
  chosen.vectors == 1 ? launch_gather<T, 1>(params, queue)
                      : launch_gather<T, kVectorsMax>(params, queue);
  launch_sum<T>({.down_bias = p.weights.down_bias,
                 .partial = params.partial,
                 .executed = params.executed,
                 .out = static_cast<T*>(p.out) + first * p.form.d,
                 .stats = listing.stats,
                 .batch = rows,
                 .d = p.form.d,
                 .shares = chosen.blocks,
                 .n_counts = chosen.blocks,
                 .shared = p.shared},
                chosen.overlaps, queue);
}

template <typename T, bool kAligned>
void launch_all(const ExecuteParams& p, const Queue& queue) {
  const auto batch = static_cast<unsigned>(p.batch);
  const auto shares = static_cast<unsigned>(shares_of(p.form.d, p.form.n_neurons));
  const unsigned needed = blocks_of(p.form.n_neurons, kActivateWarps);
  const unsigned most = blocks_of(kActivateBlocks, p.batch);
  launch("execute", "activate", activate_kernel<T, kAligned>,
         dim3(needed < most ? needed : most, batch), dim3(kActivateWarps * kWarp), queue, p,
         {.x = &p.x});
  launch("execute", "combine", combine_kernel<T, kAligned>,
         dim3(blocks_of(p.form.d, kStrip<T>), shares, batch), dim3(kCombineWarps * kWarp), queue,
         p);
  launch_sum<T>(
      {.down_bias = p.weights.down_bias,
       .partial = at<float>(p.workspace, layout_of(p.batch, p.form.d, p.form.n_neurons).partial),
       .executed = nullptr,
       .out = p.out,
       .stats = nullptr,
       .batch = p.batch,
       .d = p.form.d,
       .shares = static_cast<int>(shares),
       .n_counts = 0,
       .shared = p.shared},
      false, queue);
}

}  // namespace

int64_t execute_workspace(int64_t batch, int64_t d, int64_t n_neurons) {
  return layout_of(batch, d, n_neurons).bytes;
}

void execute_chosen(const ExecuteParams& p, const Chosen& chosen, const Listing& listing,
                    const Queue& queue) {
  // A tile of more rows than there are is the only one; so positions fit in 32 bits.
  ExecuteParams capped = p;
  if (capped.tile_rows > p.form.n_neurons) capped.tile_rows = static_cast<int>(p.form.n_neurons);
  if (chosen.path == Path::kGeneral) {
    return dispatch(p.form.dtype, "execute", [&]<typename T>() {
      const bool aligned = p.form.d % kVector<T> == 0 && is_aligned(p.weights.gate) &&
                           is_aligned(p.weights.up) && is_aligned(p.weights.down_t) &&
                           is_aligned(p.x);
      aligned ? launch_all<T, true>(capped, queue) : launch_all<T, false>(capped, queue);
    });
  }
  const auto in_parts = [&]<typename T>() {
    for (int64_t first = 0; first < p.batch; first += kRowsAtOnce) {
      const int64_t left = p.batch - first;
      const int64_t rows = left < kRowsAtOnce ? left : kRowsAtOnce;
      chosen.path == Path::kBatch ? multiply_rows<T>(capped, chosen, listing, first, rows, queue)
                                  : gather_rows<T>(capped, chosen, listing, first, rows, queue);
    }
  };
  if (p.form.dtype == DType::kF16) return in_parts.template operator()<__half>();
  in_parts.template operator()<__nv_bfloat16>();
}

Partials partials_of(const ExecuteParams& p) {
  const Layout layout = layout_of(p.batch, p.form.d, p.form.n_neurons);
  return {.sum = at<float>(p.workspace, layout.sum),
          .executed = at<int32_t>(p.workspace, layout.executed)};
}

void sum_partials(const ExecuteParams& p, const Chosen& chosen, int64_t* stats,
                  const Queue& queue) {
  const Partials partials = partials_of(p);
  const SumParams params{.down_bias = p.weights.down_bias,
                         .partial = partials.sum,
                         .executed = partials.executed,
                         .out = p.out,
                         .stats = stats,
                         .batch = p.batch,
                         .d = p.form.d,
                         .shares = chosen.blocks,
                         .n_counts = chosen.blocks,
                         .shared = p.shared};
  if (p.form.dtype == DType::kF16) return launch_sum<__half>(params, chosen.overlaps, queue);
  launch_sum<__nv_bfloat16>(params, chosen.overlaps, queue);
}

void execute(const ExecuteParams& p, Stream stream) {
  execute_chosen(p, choose(p, chip("execute")), {}, stream);
}

}  // namespace csfast::cuda
