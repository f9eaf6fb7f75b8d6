// Select on CUDA: one kernel senses and decides, one block a run of tiles; a small one joins what
// the blocks have kept to a list.
//
// Reads the codes once, which bounds it: 4.3 TB/s want 26 KB on the way to each processor, and here
// 16 warps have 3 to 6 KB each. Every block quantises the activations for itself, up to four rows,
// while its first codes come; more are quantised by a kernel before. Nothing is decided by who
// comes first: each block keeps what it keeps at a place of its own. A cap takes one block a list
// instead of the joining, which ranks the usages. Where rows do not lie on 16 bytes, and for more
// than 16 rows, usages go through memory: a kernel that senses, one that pools where tiles or rows
// decide together, one block a list.
#include "common/compact.cuh"
#include "common/device.cuh"
#include "common/dispatch.cuh"
#include "common/launch.cuh"
#include "common/quantize.cuh"
#include "common/shared.cuh"
#include "common/workspace.h"
#include "csfast/tile.h"
#include "recover/rank.cuh"
#include "recover/usage.cuh"
#include "select/select.cuh"
#include "select/sensing.cuh"
#include "sense/measure.cuh"

namespace csfast::cuda {
namespace {

constexpr int kListThreads = kRankThreads;
constexpr int kPoolThreads = 128;  // small blocks: a thread a tile, and there may be few of them
constexpr int kJoinWarps = kOverlapThreads / kWarp;

// Where the parts of the workspace begin, and its size.
struct Layout {
  int64_t q;       // (batch, q_width), int8
  int64_t scale;   // (batch), float
  int64_t usage;   // (batch, n_neurons), float
  int64_t pooled;  // (lists, n_tiles_max), and room for tiles of one neuron, float
  int64_t piece;   // (lists, n_tiles_max) likewise, int32: what blocks keep, see Segments
  int64_t count;   // (lists, blocks), int32
  int64_t missed;  // (lists, blocks), float
  int64_t bytes;
};

constexpr Layout layout_of(int64_t batch, int64_t d, int64_t n_neurons) {
  const int64_t lists = batch > 0 ? batch : 1;
  const int64_t scale = padded(batch * q_width(d));
  const int64_t usage = scale + padded(batch * int64_t{sizeof(float)});
  const int64_t pooled = usage + padded(batch * n_neurons * int64_t{sizeof(float)});
  const int64_t piece = pooled + padded(lists * n_neurons * int64_t{sizeof(float)});
  const int64_t count = piece + padded(lists * n_neurons * int64_t{sizeof(int32_t)});
  const int64_t missed = count + padded(lists * kBlocksMax * int64_t{sizeof(int32_t)});
  return {.q = 0,
          .scale = scale,
          .usage = usage,
          .pooled = pooled,
          .piece = piece,
          .count = count,
          .missed = missed,
          .bytes = missed + padded(lists * kBlocksMax * int64_t{sizeof(float)})};
}

// Whether a decision needs more than the usage of one neuron of one row.
__host__ __device__ __forceinline__ bool is_pooled(const SelectParams& p) {
  return p.decision.tile_rows > 1 || p.decision.votes != nullptr;
}

struct RunParams {
  SelectParams p;
  Segments segments;
  const int8_t* q;     // (batch, q_width), or null: the blocks quantise
  const float* scale;  // (batch), or null likewise
  float* missed;       // (lists, blocks), written
  float* usage;        // (lists, n_tiles_max), written, or null
  float* own_scale;    // (batch), written if there are usages
  int run_neurons;     // of a run, at most
};

template <Code kCode, int kProducts>
__global__ void __maxnreg__(kOverlapRegisters) run_kernel(const RunParams params) {
  __shared__ RunShared shared;
  const SelectParams& p = params.p;
  const int blocks = params.segments.blocks;
  const Runs runs = Runs::of(p.form.n_neurons, p.decision.tile_rows, blocks);
  const auto block = static_cast<int>(blockIdx.x);
  const auto batch = static_cast<int>(p.batch);
  const auto d = static_cast<int>(p.form.d);
  const auto bring = [&](int8_t* q, auto meanwhile) {
    if (params.q != nullptr) {
      return copy_rows<kCode>(params.q, params.scale, batch, d, q, shared.sense, meanwhile);
    }
    const auto quantize = [&]<typename T>() {
      quantize_rows<kCode>(static_cast<const T*>(p.x), p.sensor.equal, batch, d, q, shared.sense,
                           meanwhile);
    };
    if (p.form.dtype == DType::kF32) return quantize.template operator()<float>();
    if (p.form.dtype == DType::kF16) return quantize.template operator()<__half>();
    quantize.template operator()<__nv_bfloat16>();
  };
  const SensedRun run = sense_tiles<kCode, kProducts>(p, runs, block, params.run_neurons, shared,
                                                      dynamic_shared(), bring);

  if (params.usage != nullptr && block == 0 && threadIdx.x < p.batch) {
    params.own_scale[threadIdx.x] = shared.sense.scale[threadIdx.x];
  }

  // Keep: the block a list, or a warp each.
  const auto keep_to = [&](int list) {
    int32_t* tile = params.segments.tile + list * runs.n_tiles + run.first_tile;
    return [&params, &runs, tile, list](int64_t t, int rank, float usage) {
      if (rank >= 0) tile[rank] = static_cast<int32_t>(t);
      if (params.usage != nullptr) params.usage[list * runs.n_tiles + t] = usage;
    };
  };
  const auto write = [&](int list, const Kept& kept) {
    if (threadIdx.x % kWarp > 0) return;
    params.segments.count[list * blocks + block] = kept.count;
    params.missed[list * blocks + block] = kept.missed;
  };
  const int lists = p.decision.votes == nullptr ? batch : 1;
  if (lists == 1) {
    const Kept kept = keep_list(p, shared, run, keep_to(0));
    if (threadIdx.x < kWarp) write(0, kept);
    return;
  }
  for (int list = static_cast<int>(threadIdx.x) / kWarp; list < lists; list += kSenseWarps) {
    write(list, keep_tiles(p, shared, run, list, keep_to(list)));
  }
}

struct JoinParams {
  SelectParams p;
  Segments segments;
  const float* missed;  // (lists, blocks)
};

// A warp for every piece: several blocks share a list.
__global__ void __launch_bounds__(kOverlapThreads) join_kernel(const JoinParams params) {
  struct Shared {
    int before[kBlocksMax];  // tiles of the pieces before
    int count[kBlocksMax];
    int total;
  };
  __shared__ Shared shared;
  const SelectParams& p = params.p;
  const int64_t list = blockIdx.x;
  const auto part = static_cast<int>(blockIdx.y);  // of the pieces
  const auto parts = static_cast<int>(gridDim.y);
  const int blocks = params.segments.blocks;
  const Runs runs = Runs::of(p.form.n_neurons, p.decision.tile_rows, blocks);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int32_t* piece = params.segments.tile + list * runs.n_tiles;
  int32_t* tile = p.tile + list * runs.n_tiles;
  launch_dependents();
  wait_for_prior();

  // Add up: one warp the counts, another what was missed.
  if (warp == 0) {
    int counts[kBlocksMax / kWarp];
#pragma unroll
    for (int k = 0; k < kBlocksMax / kWarp; ++k) {
      const int i = k * kWarp + lane;
      counts[k] = i < blocks ? params.segments.count[list * blocks + i] : 0;
    }
    int total = 0;
#pragma unroll
    for (int k = 0; k < kBlocksMax / kWarp; ++k) {
      const int i = k * kWarp + lane;
      const int own = counts[k];
      int through = own;
#pragma unroll
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const int other = __shfl_up_sync(kFull, through, offset);
        if (lane >= offset) through += other;
      }
      if (i < blocks) {
        shared.before[i] = total + through - own;
        shared.count[i] = own;
      }
      total += __shfl_sync(kFull, through, kWarp - 1);
    }
    if (lane == 0) shared.total = total;
    if (lane == 0 && part == 0) {
      p.n_tiles[list] = total;
      if (p.dropped != nullptr) p.dropped[list] = 0;
    }
  } else if (warp == 1 && part == 0 && p.missed != nullptr) {
    float missed = 0.0f;
    for (int i = lane; i < blocks; i += kWarp) missed += params.missed[list * blocks + i];
    missed = warp_sum(missed);
    if (lane == 0) p.missed[list] = missed;
  }
  __syncthreads();

  for (int s = part * kJoinWarps + warp; s < blocks; s += parts * kJoinWarps) {
    const int32_t* from = piece + runs.begin(s);
    for (int i = lane; i < shared.count[s]; i += kWarp) tile[shared.before[s] + i] = from[i];
  }
  const auto n_tiles = static_cast<int>(runs.n_tiles);
  const int first = shared.total + part * kOverlapThreads + static_cast<int>(threadIdx.x);
  for (int i = first; i < n_tiles; i += parts * kOverlapThreads) tile[i] = 0;
}

template <Code kCode>
__global__ void __launch_bounds__(kMeasureWarps* kWarp) usage_kernel(const SelectParams p) {
  const Layout layout = layout_of(p.batch, p.form.d, p.form.n_neurons);
  const float* scale = at<float>(p.workspace, layout.scale);                      // (batch)
  const float2* row_scale = reinterpret_cast<const float2*>(p.sensor.row_scale);  // (n_neurons)
  float* usage = at<float>(p.workspace, layout.usage);  // (batch, n_neurons)
  measure_neurons<kCode>(p.sensor.codes, at<int8_t>(p.workspace, layout.q), p.batch, p.form.d,
                         p.form.n_neurons, [&](int64_t b, int64_t j, int y_gate, int y_up) {
                           const float2 scales = row_scale[j];
                           const float gate = scaled(scale[b], scales.x, __int2float_rn(y_gate),
                                                     p.sensor.offset, 2 * j);
                           const float up = scaled(scale[b], scales.y, __int2float_rn(y_up),
                                                   p.sensor.offset, 2 * j + 1);
                           usage[b * p.form.n_neurons + j] = usage_of(p.form.activation, gate, up);
                         });
}

__global__ void __launch_bounds__(kPoolThreads) pool_kernel(const SelectParams p) {
  const int64_t list = blockIdx.y;
  const int64_t t = int64_t{blockIdx.x} * kPoolThreads + threadIdx.x;
  const int64_t n_tiles = n_tiles_max(p.form.n_neurons, p.decision.tile_rows);
  if (t >= n_tiles) return;
  const Layout layout = layout_of(p.batch, p.form.d, p.form.n_neurons);
  const float* usage = at<float>(p.workspace, layout.usage);  // (batch, n_neurons)
  const auto of_row = [&](int64_t b) {
    return group_usage(t, p.form.n_neurons, p.decision.tile_rows,
                       [&](int64_t j) { return usage[b * p.form.n_neurons + j]; });
  };
  at<float>(p.workspace, layout.pooled)[list * n_tiles + t] =
      p.decision.votes == nullptr ? of_row(list) : joint_usage(p.decision.votes, p.batch, of_row);
}

struct ListParams {
  SelectParams p;
  const float* usage;  // (lists, n_tiles_max)
  const float* scale;  // (batch)
};

// One block a list.
__global__ void __launch_bounds__(kListThreads) list_kernel(const ListParams params) {
  struct Shared {
    CompactShared compact;
    RankShared rank;
  };
  __shared__ Shared shared;
  const SelectParams& p = params.p;
  const int64_t list = blockIdx.x;
  const int64_t n_tiles = n_tiles_max(p.form.n_neurons, p.decision.tile_rows);
  const float* usage = params.usage + list * n_tiles;
  const Votes votes = votes_of(p.decision.votes, params.scale, p.batch, list);
  const float threshold = p.decision.threshold[list];
  int32_t* tile = p.tile + list * n_tiles;  // (n_tiles)

  float missed = 0.0f;
  const auto by_threshold = [&](int64_t t) {
    return is_kept(usage[t], threshold, votes) ? Choice::kKeep : Choice::kDrop;
  };
  const auto emit = [&](int64_t t, int rank) {
    if (rank >= 0) {
      tile[rank] = static_cast<int32_t>(t);
    } else {
      missed = __fmaf_rn(usage[t], usage[t], missed);
    }
  };
  int kept = compact(shared.compact, n_tiles, 0, by_threshold, emit);
  const int wanted = kept;
  if (p.decision.cap != nullptr && !votes.all) {
    const int cap = max(p.decision.cap[list], 0);
    if (kept > cap) {  // every thread alike
      missed = 0.0f;
      if (cap > 0) find_last_key(shared.rank, usage, n_tiles, cap);
      const unsigned last = shared.rank.prefix;
      const int ties = cap > 0 ? shared.rank.left : 0;
      const auto by_rank = [&](int64_t t) {
        if (cap == 0) return Choice::kDrop;
        const unsigned key = key_of(usage[t]);
        return key > last ? Choice::kKeep : key == last ? Choice::kTie : Choice::kDrop;
      };
      __syncthreads();  // the longer list is written
      kept = compact(shared.compact, n_tiles, ties, by_rank, emit);
    }
  }
  __syncthreads();  // the list is written
  for (int i = kept + static_cast<int>(threadIdx.x); i < n_tiles; i += kListThreads) tile[i] = 0;
  if (threadIdx.x == 0) {
    p.n_tiles[list] = kept;
    if (p.dropped != nullptr) p.dropped[list] = wanted - kept;
  }
  if (p.missed == nullptr) return;
  missed = block_sum(shared.compact, missed);
  if (threadIdx.x == 0) p.missed[list] = missed;
}

int lists_of(const SelectParams& p) {
  return static_cast<int>(p.decision.votes == nullptr ? p.batch : 1);
}

void quantize_all(const SelectParams& p, const Layout& layout, bool overlaps, const Queue& queue) {
  dispatch(p.form.dtype, "select", [&]<typename T>() {
    quantize<T>("select",
                {.equal = p.sensor.equal,
                 .x = p.x,
                 .q = at<int8_t>(p.workspace, layout.q),
                 .scale = at<float>(p.workspace, layout.scale),
                 .d = p.form.d},
                p.batch, queue, overlaps);
  });
}

// With a cap, usages and scales stay in the workspace as well.
Segments launch_runs(const SelectParams& p, const ChosenSelect& chosen, const Queue& queue) {
  const Layout layout = layout_of(p.batch, p.form.d, p.form.n_neurons);
  const Segments segments{.tile = at<int32_t>(p.workspace, layout.piece),
                          .count = at<int32_t>(p.workspace, layout.count),
                          .blocks = chosen.blocks};
  if (chosen.quantized) quantize_all(p, layout, chosen.overlaps, queue);
  const RunParams params{
      .p = p,
      .segments = segments,
      .q = chosen.quantized ? at<int8_t>(p.workspace, layout.q) : nullptr,
      .scale = chosen.quantized ? at<float>(p.workspace, layout.scale) : nullptr,
      .missed = at<float>(p.workspace, layout.missed),
      .usage = p.decision.cap == nullptr ? nullptr : at<float>(p.workspace, layout.pooled),
      .own_scale = at<float>(p.workspace, layout.scale),
      .run_neurons = chosen.run_neurons};
  dispatch_code(p.sensor.code, "select", [&]<Code kCode>() {
    const auto kernel = p.batch <= kProductColumns ? run_kernel<kCode, 1> : run_kernel<kCode, 2>;
    launch("select", "run", kernel, dim3(static_cast<unsigned>(chosen.blocks)), dim3(kSenseThreads),
           queue, params,
           {.shared_bytes = chosen.shared_bytes, .overlaps = chosen.overlaps, .x = &params.p.x});
  });
  return segments;
}

void launch_list(const SelectParams& p, const float* usage, const Queue& queue) {
  const float* scale = at<float>(p.workspace, layout_of(p.batch, p.form.d, p.form.n_neurons).scale);
  launch("select", "list", list_kernel, dim3(static_cast<unsigned>(lists_of(p))),
         dim3(kListThreads), queue, ListParams{.p = p, .usage = usage, .scale = scale});
}

}  // namespace

int64_t select_workspace(int64_t batch, int64_t d, int64_t n_neurons) {
  return layout_of(batch, d, n_neurons).bytes;
}

Segments select_segments(const SelectParams& p, const ChosenSelect& chosen, const Queue& queue) {
  want_aligned(p.sensor.codes, 16, "select", "codes");
  want_aligned(p.sensor.row_scale, 8, "select", "row_scale");
  return launch_runs(p, chosen, queue);
}

void select_chosen(const SelectParams& p, const ChosenSelect& chosen, const Queue& queue) {
  const Layout layout = layout_of(p.batch, p.form.d, p.form.n_neurons);
  const auto lists = static_cast<unsigned>(lists_of(p));
  if (chosen.one_pass) {
    const Segments segments = select_segments(p, chosen, queue);
    if (p.decision.cap != nullptr) {
      return launch_list(p, at<float>(p.workspace, layout.pooled), queue);
    }
    return launch(
        "select", "join", join_kernel, dim3(lists, blocks_of(segments.blocks, kJoinWarps)),
        dim3(kOverlapThreads), queue,
        JoinParams{.p = p, .segments = segments, .missed = at<float>(p.workspace, layout.missed)},
        {.overlaps = chosen.overlaps});
  }
  want_aligned(p.sensor.codes, 16, "select", "codes");
  want_aligned(p.sensor.row_scale, 8, "select", "row_scale");
  if (p.batch > 0) {  // or a joint decision of nobody, which still leaves an empty list
    quantize_all(p, layout, false, queue);
    dispatch_code(p.sensor.code, "select", [&]<Code kCode>() {
      launch("select", "usage", usage_kernel<kCode>,
             dim3(blocks_of(p.form.n_neurons, kMeasureWarps * kMeasureNeurons)),
             dim3(kMeasureWarps * kWarp), queue, p);
    });
  }
  if (is_pooled(p)) {
    launch(
        "select", "pool", pool_kernel,
        dim3(blocks_of(n_tiles_max(p.form.n_neurons, p.decision.tile_rows), kPoolThreads), lists),
        dim3(kPoolThreads), queue, p);
  }
  launch_list(p, at<float>(p.workspace, is_pooled(p) ? layout.pooled : layout.usage), queue);
}

void select(const SelectParams& p, Stream stream) {
  select_chosen(p, choose(p, chip("select")), stream);
}

}  // namespace csfast::cuda
