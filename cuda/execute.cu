// Execute on CUDA: activations, then partial outputs, then their sum. Three kernels.
//
// Reads gate, up and down_t of the listed neurons once, 3 * d elements a neuron, which bounds it.
//   activate  one warp per neuron; x in shared memory, weights straight to registers
//   combine   one block per strip of columns and share of the list; each warp takes every eighth
//             neuron of the share
//   sum       adds the shares up, in their order
// Shares are counted from the sizes of one row, so a row's result does not depend on its batch.
// If a row of the weights or of x begins off a multiple of 16 bytes, all go by single elements.
#include <bit>

#include "common/dispatch.cuh"
#include "common/launch.cuh"
#include "common/usage.cuh"
#include "common/warp.cuh"
#include "common/workspace.cuh"
#include "csfast/execute.h"

namespace csfast::cuda {
namespace {

constexpr int kActivateWarps = 4;      // a block: small ones, so that a short list has many
constexpr int kActivateBlocks = 4096;  // at most, of all rows; those beyond a list end at once
constexpr int kCombineWarps = 8;       // a block: 256 threads, eight blocks fill an SM of 2048
constexpr int kSumWarps = 8;           // likewise
constexpr int kUnroll = 4;             // loads of 16 bytes that a lane has in flight, a matrix
constexpr int kPanel = 4096;           // channels of x in shared memory: 16 KB at most

template <typename T>
constexpr int kVector = 16 / sizeof(T);  // elements of one load
template <typename T>
constexpr int kStrip = kWarp * kVector<T>;  // columns of one warp of combine

template <typename T>
struct alignas(16) Vector {
  T at[kVector<T>];
};

template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* from) {
  return std::bit_cast<Vector<T>>(__ldg(reinterpret_cast<const uint4*>(from)));
}

// Shares of the list: about 512 blocks of combine, four on each of 128 SMs, for strips of 256
// columns; no more than 32, whose partial sums, written and read, are as many bytes as 128 rows of
// 16-bit weights; about 32 neurons each or more when the list is full.
constexpr int64_t shares_of(int64_t d, int64_t n_neurons) {
  const int64_t wanted = 512 / ((d + 255) / 256);
  const int64_t most = (n_neurons + 31) / 32 < 32 ? (n_neurons + 31) / 32 : 32;
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

// Where the parts of the workspace begin, and its size.
struct Layout {
  int64_t activation;  // (batch, n_neurons), float; written where listed
  int64_t partial;     // (batch, shares, d), float
  int64_t bytes;
};

constexpr Layout layout_of(int64_t batch, int64_t d, int64_t n_neurons) {
  const int64_t partial = padded(batch * n_neurons * int64_t{sizeof(float)});
  const int64_t shares = shares_of(d, n_neurons);
  return {.activation = 0,
          .partial = partial,
          .bytes = partial + padded(batch * shares * d * int64_t{sizeof(float)})};
}

// The neurons of one row's tile list, by position: tile_rows to a tile.
struct Listed {
  const int32_t* tile;  // (n_tiles)
  int64_t count;        // of positions
  int64_t n_neurons;
  int tile_rows;

  __device__ Listed(const ExecuteParams& p, int64_t b)
      : n_neurons(p.n_neurons), tile_rows(p.tile_rows) {
    const int64_t list = p.shared ? 0 : b;
    const int64_t most = n_tiles_max(p.n_neurons, p.tile_rows);
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
  const T* x = static_cast<const T*>(p.x) + b * p.d;  // (d)
  const Listed listed(p, b);
  float* activation =
      at<float>(p.workspace, layout_of(p.batch, p.d, p.n_neurons).activation) + b * p.n_neurons;

  bool loaded = false;
  for (int64_t first = int64_t{blockIdx.x} * kActivateWarps; first < listed.count;
       first += stride) {
    const int64_t j = listed.neuron(first + warp);
    const T* gate = static_cast<const T*>(p.gate) + j * p.d;  // (d), of no meaning for j < 0
    const T* up = static_cast<const T*>(p.up) + j * p.d;
    float g = 0.0f;
    float u = 0.0f;
    for (int64_t c = 0; c < p.d; c += kPanel) {
      const int width = static_cast<int>(min(p.d - c, int64_t{kPanel}));
      if (!loaded || p.d > kPanel) {
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
      activation[j] =
          activate(p.activation, add_bias<T>(g, p.gate_bias, j)) * add_bias<T>(u, p.up_bias, j);
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
  const Layout layout = layout_of(p.batch, p.d, p.n_neurons);
  const float* activation = at<float>(p.workspace, layout.activation) + b * p.n_neurons;
  float* partial = at<float>(p.workspace, layout.partial) + (b * shares + share) * p.d;  // (d)
  const T* down_t = static_cast<const T*>(p.down_t) + first_column;
  const int width = static_cast<int>(min(p.d - first_column, int64_t{kStrip<T>}));
  const Listed listed(p, b);
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
      const T* row = down_t + j * p.d;
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

template <typename T>
__global__ void __launch_bounds__(kSumWarps* kWarp) sum_kernel(const ExecuteParams p) {
  struct Shared {
    float sum[kSumWarps][kWarp];
  };
  __shared__ Shared shared;
  const int64_t b = blockIdx.y;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t column = int64_t{blockIdx.x} * kWarp + lane;
  const int64_t shares = shares_of(p.d, p.n_neurons);
  const float* partial = at<float>(p.workspace, layout_of(p.batch, p.d, p.n_neurons).partial) +
                         b * shares * p.d;  // (shares, d)

  float sum = 0.0f;
  if (column < p.d) {
    for (int64_t s = warp; s < shares; s += kSumWarps) sum += partial[s * p.d + column];
  }
  shared.sum[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= p.d) return;
#pragma unroll
  for (int w = 1; w < kSumWarps; ++w) sum += shared.sum[w][lane];
  static_cast<T*>(p.out)[b * p.d + column] = static_cast<T>(add_bias<T>(sum, p.down_bias, column));
}

template <typename T, bool kAligned>
void launch_all(const ExecuteParams& p, Stream stream) {
  const auto batch = static_cast<unsigned>(p.batch);
  const auto shares = static_cast<unsigned>(shares_of(p.d, p.n_neurons));
  const unsigned needed = blocks_of(p.n_neurons, kActivateWarps);
  const unsigned most = blocks_of(kActivateBlocks, p.batch);
  launch("execute", "activate", activate_kernel<T, kAligned>,
         dim3(needed < most ? needed : most, batch), dim3(kActivateWarps * kWarp), stream, p);
  launch("execute", "combine", combine_kernel<T, kAligned>,
         dim3(blocks_of(p.d, kStrip<T>), shares, batch), dim3(kCombineWarps * kWarp), stream, p);
  launch("execute", "sum", sum_kernel<T>, dim3(blocks_of(p.d, kWarp), batch),
         dim3(kSumWarps * kWarp), stream, p);
}

}  // namespace

int64_t execute_workspace(int64_t batch, int64_t d, int64_t n_neurons) {
  return layout_of(batch, d, n_neurons).bytes;
}

void execute(const ExecuteParams& p, Stream stream) {
  // A tile of more rows than there are is the only one; so positions fit in 32 bits.
  ExecuteParams capped = p;
  if (capped.tile_rows > p.n_neurons) capped.tile_rows = static_cast<int>(p.n_neurons);
  dispatch(p.dtype, "execute", [&]<typename T>() {
    const bool aligned = p.d % kVector<T> == 0 && is_aligned(p.gate) && is_aligned(p.up) &&
                         is_aligned(p.down_t) && is_aligned(p.x);
    aligned ? launch_all<T, true>(capped, stream) : launch_all<T, false>(capped, stream);
  });
}

}  // namespace csfast::cuda
