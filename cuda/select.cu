// Select on CUDA: quantise, then sense and judge in one kernel, then list the tiles in one block a
// row.
//
// Reads the codes once, which bounds it; the usages between the kernels, four bytes a neuron, stay
// in the L2 cache.
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

// Where the parts of the workspace begin, and its size.
struct Layout {
  int64_t q;      // (batch, q_width), int8
  int64_t scale;  // (batch), float
  int64_t usage;  // (batch, n_neurons), float
  int64_t bytes;
};

constexpr Layout layout_of(int64_t batch, int64_t d, int64_t n_neurons) {
  const int64_t scale = padded(batch * q_width(d));
  const int64_t usage = scale + padded(batch * int64_t{sizeof(float)});
  return {.q = 0,
          .scale = scale,
          .usage = usage,
          .bytes = usage + padded(batch * n_neurons * int64_t{sizeof(float)})};
}

template <Code kCode>
__global__ void __launch_bounds__(kMeasureWarps* kWarp) usage_kernel(const SelectParams p) {
  const Layout layout = layout_of(p.batch, p.d, p.n_neurons);
  const float* scale = at<float>(p.workspace, layout.scale);               // (batch)
  const float2* row_scale = reinterpret_cast<const float2*>(p.row_scale);  // (n_neurons)
  float* usage = at<float>(p.workspace, layout.usage);                     // (batch, n_neurons)
  measure_neurons<kCode>(p.codes, at<int8_t>(p.workspace, layout.q), p.batch, p.d, p.n_neurons,
                         [&](int64_t b, int64_t j, int y_gate, int y_up) {
                           usage[b * p.n_neurons + j] =
                               usage_of(scale[b], row_scale[j], y_gate, y_up);
                         });
}

__global__ void __launch_bounds__(kListThreads) list_kernel(const SelectParams p) {
  __shared__ CompactShared shared;
  const int64_t b = blockIdx.x;
  const int64_t n_tiles = n_tiles_max(p.n_neurons, p.tile_rows);
  const Layout layout = layout_of(p.batch, p.d, p.n_neurons);
  const float* usage = at<float>(p.workspace, layout.usage) + b * p.n_neurons;  // (n_neurons)
  const float scale = at<float>(p.workspace, layout.scale)[b];
  const float threshold = p.threshold[b];
  int32_t* tile = p.tile + b * n_tiles;  // (n_tiles)

  const auto choose = [&](int64_t t) {
    const int64_t end = min((t + 1) * p.tile_rows, p.n_neurons);
    bool keep = false;
    for (int64_t j = t * p.tile_rows; j < end; ++j) keep |= is_kept(usage[j], threshold, scale);
    return keep ? Choice::kKeep : Choice::kDrop;
  };
  const auto emit = [&](int64_t t, int rank) {
    if (rank >= 0) tile[rank] = static_cast<int32_t>(t);
  };
  const int kept = compact(shared, n_tiles, 0, choose, emit);
  if (threadIdx.x == 0) p.n_tiles[b] = kept;
  if (p.missed == nullptr) return;

  // Missed, in the order of recover: over neurons, whatever a tile holds.
  float missed = 0.0f;
  visit_run(p.n_neurons, [&](int64_t j, bool inside) {
    if (inside && !is_kept(usage[j], threshold, scale)) {
      missed = __fmaf_rn(usage[j], usage[j], missed);
    }
  });
  missed = block_sum(shared, missed);
  if (threadIdx.x == 0) p.missed[b] = missed;
}

}  // namespace

int64_t select_workspace(int64_t batch, int64_t d, int64_t n_neurons) {
  return layout_of(batch, d, n_neurons).bytes;
}

void select(const SelectParams& p, Stream stream) {
  want_aligned(p.codes, 16, "select", "codes");
  want_aligned(p.row_scale, 8, "select", "row_scale");
  const Layout layout = layout_of(p.batch, p.d, p.n_neurons);
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
  launch("select", "list", list_kernel, dim3(static_cast<unsigned>(p.batch)), dim3(kListThreads),
         stream, p);
}

}  // namespace csfast::cuda
