// Select on CUDA: quantise, then sense in one kernel that leaves the usages, then list the tiles in
// one block a list.
//
// Reads the codes once, which bounds it; the usages between the kernels, four bytes a neuron, stay
// in the L2 cache. Tiles of several neurons, and rows that decide together, want a kernel more that
// pools the usages.
#include "common/compact.cuh"
#include "common/dispatch.cuh"
#include "common/launch.cuh"
#include "common/measure.cuh"
#include "common/quantize.cuh"
#include "common/usage.cuh"
#include "common/workspace.cuh"
#include "csfast/select.h"
#include "csfast/tile.h"

namespace csfast::cuda {
namespace {

constexpr int kListThreads = kCompactWarps * kWarp;
constexpr int kPoolThreads = 128;  // small blocks: a thread a tile, and there may be few of them

// Where the parts of the workspace begin, and its size.
struct Layout {
  int64_t q;       // (batch, q_width), int8
  int64_t scale;   // (batch), float
  int64_t usage;   // (batch, n_neurons), float
  int64_t pooled;  // (lists, n_tiles_max), and room for tiles of one neuron, float
  int64_t bytes;
};

constexpr Layout layout_of(int64_t batch, int64_t d, int64_t n_neurons) {
  const int64_t lists = batch > 0 ? batch : 1;
  const int64_t scale = padded(batch * q_width(d));
  const int64_t usage = scale + padded(batch * int64_t{sizeof(float)});
  const int64_t pooled = usage + padded(batch * n_neurons * int64_t{sizeof(float)});
  return {.q = 0,
          .scale = scale,
          .usage = usage,
          .pooled = pooled,
          .bytes = pooled + padded(lists * n_neurons * int64_t{sizeof(float)})};
}

// Whether a decision needs more than the usage of one neuron of one row.
__host__ __device__ __forceinline__ bool is_pooled(const SelectParams& p) {
  return p.tile_rows > 1 || p.weight != nullptr;
}

template <Code kCode>
__global__ void __launch_bounds__(kMeasureWarps* kWarp) usage_kernel(const SelectParams p) {
  const Layout layout = layout_of(p.batch, p.d, p.n_neurons);
  const float* scale = at<float>(p.workspace, layout.scale);               // (batch)
  const float2* row_scale = reinterpret_cast<const float2*>(p.row_scale);  // (n_neurons)
  float* usage = at<float>(p.workspace, layout.usage);                     // (batch, n_neurons)
  measure_neurons<kCode>(
      p.codes, at<int8_t>(p.workspace, layout.q), p.batch, p.d, p.n_neurons,
      [&](int64_t b, int64_t j, int y_gate, int y_up) {
        const float2 scales = row_scale[j];
        const float gate = scaled(scale[b], scales.x, __int2float_rn(y_gate), p.offset, 2 * j);
        const float up = scaled(scale[b], scales.y, __int2float_rn(y_up), p.offset, 2 * j + 1);
        usage[b * p.n_neurons + j] = usage_of(p.activation, gate, up);
      });
}

__global__ void __launch_bounds__(kPoolThreads) pool_kernel(const SelectParams p) {
  const int64_t list = blockIdx.y;
  const int64_t t = int64_t{blockIdx.x} * kPoolThreads + threadIdx.x;
  const int64_t n_tiles = n_tiles_max(p.n_neurons, p.tile_rows);
  if (t >= n_tiles) return;
  const Layout layout = layout_of(p.batch, p.d, p.n_neurons);
  const float* usage = at<float>(p.workspace, layout.usage);  // (batch, n_neurons)
  const auto of_row = [&](int64_t b) {
    return group_usage(t, p.n_neurons, p.tile_rows,
                       [&](int64_t j) { return usage[b * p.n_neurons + j]; });
  };
  at<float>(p.workspace, layout.pooled)[list * n_tiles + t] =
      p.weight == nullptr ? of_row(list) : joint_usage(p.weight, p.batch, of_row);
}

__global__ void __launch_bounds__(kListThreads) list_kernel(const SelectParams p) {
  __shared__ CompactShared shared;
  const int64_t list = blockIdx.x;
  const int64_t n_tiles = n_tiles_max(p.n_neurons, p.tile_rows);
  const Layout layout = layout_of(p.batch, p.d, p.n_neurons);
  const float* usage =
      at<float>(p.workspace, is_pooled(p) ? layout.pooled : layout.usage) + list * n_tiles;
  const Votes votes = votes_of(p.weight, at<float>(p.workspace, layout.scale), p.batch, list);
  const float threshold = p.threshold[list];
  int32_t* tile = p.tile + list * n_tiles;  // (n_tiles)

  float missed = 0.0f;
  const auto choose = [&](int64_t t) {
    return is_kept(usage[t], threshold, votes) ? Choice::kKeep : Choice::kDrop;
  };
  const auto emit = [&](int64_t t, int rank) {
    if (rank >= 0) {
      tile[rank] = static_cast<int32_t>(t);
    } else {
      missed = __fmaf_rn(usage[t], usage[t], missed);
    }
  };
  const int kept = compact(shared, n_tiles, 0, choose, emit);
  if (threadIdx.x == 0) p.n_tiles[list] = kept;
  if (p.missed == nullptr) return;
  missed = block_sum(shared, missed);
  if (threadIdx.x == 0) p.missed[list] = missed;
}

}  // namespace

int64_t select_workspace(int64_t batch, int64_t d, int64_t n_neurons) {
  return layout_of(batch, d, n_neurons).bytes;
}

void select(const SelectParams& p, Stream stream) {
  want_aligned(p.codes, 16, "select", "codes");
  want_aligned(p.row_scale, 8, "select", "row_scale");
  const Layout layout = layout_of(p.batch, p.d, p.n_neurons);
  const auto lists = static_cast<unsigned>(p.weight == nullptr ? p.batch : 1);
  if (p.batch > 0) {  // or a joint decision of nobody, which still leaves an empty list
    dispatch(p.dtype, "select", [&]<typename T>() {
      quantize<T>("select",
                  {.equal = p.equal,
                   .x = p.x,
                   .q = at<int8_t>(p.workspace, layout.q),
                   .scale = at<float>(p.workspace, layout.scale),
                   .d = p.d},
                  p.batch, stream);
    });
    dispatch_code(p.code, "select", [&]<Code kCode>() {
      launch("select", "usage", usage_kernel<kCode>,
             dim3(blocks_of(p.n_neurons, kMeasureWarps * kMeasureNeurons)),
             dim3(kMeasureWarps * kWarp), stream, p);
    });
  }
  if (is_pooled(p)) {
    launch("select", "pool", pool_kernel,
           dim3(blocks_of(n_tiles_max(p.n_neurons, p.tile_rows), kPoolThreads), lists),
           dim3(kPoolThreads), stream, p);
  }
  launch("select", "list", list_kernel, dim3(lists), dim3(kListThreads), stream, p);
}

}  // namespace csfast::cuda
