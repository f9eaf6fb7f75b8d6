// Ffn on CUDA: select, then execute on what it leaves in the workspace.
//
// Three kernels, each of which may begin while the one before ends: select leaves its list in
// pieces, execute takes its share of them, the sum adds up and counts. For one row on kRange, two:
// a block that has sensed its run goes on to the weights of what it keeps of it. Where either goes
// its general path, and with a cap, they meet at a list; there whoever counts costs a kernel of one
// thread.
#include "common/device.cuh"
#include "common/dispatch.cuh"
#include "common/launch.cuh"
#include "common/shared.cuh"
#include "common/workspace.h"
#include "csfast/ffn.h"
#include "execute/execute.cuh"
#include "ffn/sizes.h"
#include "select/select.cuh"

namespace csfast::cuda {
namespace {

// Where the parts of the workspace begin, and its size.
struct Layout {
  int64_t tile;     // (batch, n_tiles_max) and room for tile_rows = 1, int32
  int64_t n_tiles;  // (batch), int32
  int64_t dropped;  // (batch), int32
  int64_t select;   // select_workspace()
  int64_t execute;  // execute_workspace()
  int64_t bytes;
};

Layout layout_of(int64_t batch, int64_t d, int64_t n_neurons) {
  const int64_t n_tiles = padded(batch * n_neurons * int64_t{sizeof(int32_t)});
  const int64_t dropped = n_tiles + padded(batch * int64_t{sizeof(int32_t)});
  const int64_t select = dropped + padded(batch * int64_t{sizeof(int32_t)});
  const int64_t execute = select + padded(select_workspace(batch, d, n_neurons));
  return {.tile = 0,
          .n_tiles = n_tiles,
          .dropped = dropped,
          .select = select,
          .execute = execute,
          .bytes = execute + padded(execute_workspace(batch, d, n_neurons))};
}

struct CountParams {
  const int32_t* tile;     // (lists, n_tiles_max)
  const int32_t* n_tiles;  // (lists)
  const int32_t* dropped;  // (lists)
  int64_t* stats;          // (2), or null
  int64_t* all_dropped;    // (1), or null
  int64_t batch, n_neurons;
  int tile_rows;
  bool shared;  // one list, which every row of the batch executes
};

__global__ void __launch_bounds__(1) count_kernel(const CountParams p) {
  const int64_t most = n_tiles_max(p.n_neurons, p.tile_rows);
  int64_t neurons = 0;
  for (int64_t list = 0; list < (p.shared ? 1 : p.batch); ++list) {
    const int64_t n = p.n_tiles[list];
    neurons += n * p.tile_rows;
    // The last tile of all may hold fewer neurons than the others.
    if (n > 0 && p.tile[list * most + n - 1] == most - 1) {
      neurons -= most * p.tile_rows - p.n_neurons;
    }
  }
  if (p.shared) neurons *= p.batch;
  if (p.all_dropped != nullptr) {
    for (int64_t list = 0; list < (p.shared ? 1 : p.batch); ++list) {
      *p.all_dropped += p.dropped[list];
    }
  }
  if (p.stats == nullptr) return;
  p.stats[0] += p.batch;
  p.stats[1] += neurons;
}

struct RangeParams {
  SelectParams selection;  // of one row
  ExecuteParams execution;
  Chosen chosen;
  Partials partials;
  int run_neurons;  // of a run, at most
  bool counts;
};

template <Code kCode, typename T>
__global__ void __maxnreg__(kOverlapRegisters) range_kernel(const RangeParams params) {
  static_assert(kSenseThreads == kGatherThreads);
  struct Shared {
    RunShared run;
    GatherShared<kRegisterNeurons<1>> gather;
    OwnX<1>::Shared x;
  };
  static_assert(sizeof(Shared) <= kRangeOtherBytes);
  __shared__ Shared shared;
  const SelectParams& p = params.selection;
  const Runs runs = Runs::of(p.form.n_neurons, p.decision.tile_rows, params.chosen.blocks);
  const auto block = static_cast<int>(blockIdx.x);
  const int tile_rows = p.decision.tile_rows;
  char* room = dynamic_shared();
  int32_t* neurons =
      reinterpret_cast<int32_t*>(room + range_list_at(kCode, p.form.d, params.run_neurons));
  const auto bring = [&](int8_t* q, auto meanwhile) {
    quantize_rows<kCode>(static_cast<const T*>(p.x), p.sensor.equal, 1, static_cast<int>(p.form.d),
                         q, shared.run.sense, meanwhile);
  };
  const SensedRun run = sense_tiles<kCode, 1>(p, runs, block, params.run_neurons, shared.run,
                                              room + kSumBytes<1>, bring);

  Gather gather = gather_of<T>(params.execution, neurons, 0, params.chosen.group_threads);
  const Place place(params.chosen.group_threads);
  OwnX<1> x{shared.x};
  load_x(gather, place, p.x, x);  // on its way meanwhile

  // Keep
  const Kept kept = keep_list(p, shared.run, run, [&](int64_t t, int rank, float) {
    if (rank < 0) return;
    for (int i = 0; i < tile_rows; ++i) {
      const int64_t j = t * tile_rows + i;
      neurons[rank * tile_rows + i] = j < p.form.n_neurons ? static_cast<int32_t>(j) : -1;
    }
  });
  gather.count = kept.count * tile_rows;
  __syncthreads();
  if (params.counts && threadIdx.x < kWarp) {
    const int there = neurons_of(gather.neurons, gather.count);
    if (threadIdx.x == 0) params.partials.executed[block] = there;
  }

  // Gather
  float sum[1][kLaneColumns] = {};
  gather_register<T, 1>(gather, place, shared.gather, x, sum);
  write_partial<1>(gather, place, sum, reinterpret_cast<float*>(room),
                   params.partials.sum + int64_t{block} * p.form.d);
}

void launch_range(const RangeParams& params, int shared_bytes, const Queue& queue) {
  const auto launch_code = [&]<Code kCode, typename T>() {
    launch("ffn", "range", range_kernel<kCode, T>,
           dim3(static_cast<unsigned>(params.chosen.blocks)), dim3(kSenseThreads), queue, params,
           {.shared_bytes = shared_bytes,
            .overlaps = params.chosen.overlaps,
            .x = &params.selection.x});
  };
  dispatch_code(params.selection.sensor.code, "ffn", [&]<Code kCode>() {
    params.selection.form.dtype == DType::kF16
        ? launch_code.template operator()<kCode, __half>()
        : launch_code.template operator()<kCode, __nv_bfloat16>();
  });
}

void ffn_chosen(const FfnParams& p, const ChosenFfn& chosen, const Queue& queue) {
  const Form& form = p.layer.form;
  const Decision& decision = p.layer.decision;
  const Layout layout = layout_of(p.batch, form.d, form.n_neurons);
  int32_t* tile = at<int32_t>(p.workspace, layout.tile);
  int32_t* n_tiles = at<int32_t>(p.workspace, layout.n_tiles);
  int32_t* dropped = at<int32_t>(p.workspace, layout.dropped);
  const SelectParams selection =
      p.selection(at<void>(p.workspace, layout.select), tile, n_tiles, dropped);
  const ExecuteParams execution = p.execution(at<void>(p.workspace, layout.execute), tile, n_tiles);
  if (chosen.immediate) {
    launch_range({.selection = selection,
                  .execution = execution,
                  .chosen = chosen.execute,
                  .partials = partials_of(execution),
                  .run_neurons = chosen.select.run_neurons,
                  .counts = p.stats != nullptr},
                 chosen.shared_bytes, queue);
    return sum_partials(execution, chosen.execute, p.stats, queue);
  }
  const bool is_general = chosen.execute.path == Path::kGeneral;
  Listing listing{.segments = {}, .stats = is_general ? nullptr : p.stats};
  if (chosen.piecewise) {
    listing.segments = select_segments(selection, chosen.select, queue);
  } else {
    select_chosen(selection, chosen.select, queue);
  }
  execute_chosen(execution, chosen.execute, listing, queue);
  int64_t* stats = is_general ? p.stats : nullptr;
  int64_t* all_dropped = decision.cap == nullptr ? nullptr : p.dropped;
  if (stats == nullptr && all_dropped == nullptr) return;
  launch("ffn", "count", count_kernel, dim3(1), dim3(1), queue,
         CountParams{.tile = tile,
                     .n_tiles = n_tiles,
                     .dropped = dropped,
                     .stats = stats,
                     .all_dropped = all_dropped,
                     .batch = p.batch,
                     .n_neurons = form.n_neurons,
                     .tile_rows = decision.tile_rows,
                     .shared = p.is_joint()});
}

}  // namespace

int64_t ffn_workspace(int64_t batch, int64_t d, int64_t n_neurons) {
  return layout_of(batch, d, n_neurons).bytes;
}

void ffn(const FfnParams& p, Stream stream) {
  ffn_chosen(p, choose(p, chip("ffn")), stream);
}

Prepared prepare(const FfnParams& p) {
  const OnDevice there("ffn", p.layer.weights.gate);
  FfnParams later = p;
  later.x = nullptr;
  later.out = nullptr;
  Prepared prepared;
  ffn_chosen(later, choose(later, chip("ffn")), Queue(prepared));
  return prepared;
}

Replay replay(const FfnParams& p) {
  const OnDevice there("ffn", p.layer.weights.gate);
  return Replay(prepare(p));
}

}  // namespace csfast::cuda
