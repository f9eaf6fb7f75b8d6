// Ffn on CUDA: select, then execute on what it leaves in the workspace.
//
// Three kernels, each of which may begin while the one before ends: select leaves its list in
// pieces, execute takes its share of them, the sum adds up and counts. Where either goes its
// general path, they meet at a list, and whoever counts costs a kernel of one thread.
#include "common/launch.cuh"
#include "common/workspace.cuh"
#include "csfast/ffn.h"
#include "execute.cuh"
#include "select.cuh"

namespace csfast::cuda {
namespace {

// Where the parts of the workspace begin, and its size.
struct Layout {
  int64_t tile;     // (batch, n_tiles_max) and room for tile_rows = 1, int32
  int64_t n_tiles;  // (batch), int32
  int64_t select;   // select_workspace()
  int64_t execute;  // execute_workspace()
  int64_t bytes;
};

Layout layout_of(int64_t batch, int64_t d, int64_t n_neurons) {
  const int64_t n_tiles = padded(batch * n_neurons * int64_t{sizeof(int32_t)});
  const int64_t select = n_tiles + padded(batch * int64_t{sizeof(int32_t)});
  const int64_t execute = select + padded(select_workspace(batch, d, n_neurons));
  return {.tile = 0,
          .n_tiles = n_tiles,
          .select = select,
          .execute = execute,
          .bytes = execute + padded(execute_workspace(batch, d, n_neurons))};
}

struct CountParams {
  const int32_t* tile;     // (lists, n_tiles_max)
  const int32_t* n_tiles;  // (lists)
  int64_t* stats;          // (2)
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
  p.stats[0] += p.batch;
  p.stats[1] += neurons;
}

}  // namespace

int64_t ffn_workspace(int64_t batch, int64_t d, int64_t n_neurons) {
  return layout_of(batch, d, n_neurons).bytes;
}

void ffn(const FfnParams& p, Stream stream) {
  const Layout layout = layout_of(p.batch, p.d, p.n_neurons);
  int32_t* tile = at<int32_t>(p.workspace, layout.tile);
  int32_t* n_tiles = at<int32_t>(p.workspace, layout.n_tiles);
  const SelectParams selection{.codes = p.codes,
                               .equal = p.equal,
                               .row_scale = p.row_scale,
                               .offset = p.offset,
                               .weight = p.weight,
                               .threshold = p.threshold,
                               .x = p.x,
                               .workspace = at<void>(p.workspace, layout.select),
                               .tile = tile,
                               .n_tiles = n_tiles,
                               .missed = nullptr,
                               .batch = p.batch,
                               .d = p.d,
                               .n_neurons = p.n_neurons,
                               .code = p.code,
                               .tile_rows = p.tile_rows,
                               .dtype = p.dtype,
                               .activation = p.activation,
                               .design = p.design};
  const ExecuteParams execution{.gate = p.gate,
                                .up = p.up,
                                .down_t = p.down_t,
                                .gate_bias = p.gate_bias,
                                .up_bias = p.up_bias,
                                .down_bias = p.down_bias,
                                .x = p.x,
                                .tile = tile,
                                .n_tiles = n_tiles,
                                .workspace = at<void>(p.workspace, layout.execute),
                                .out = p.out,
                                .batch = p.batch,
                                .d = p.d,
                                .n_neurons = p.n_neurons,
                                .tile_rows = p.tile_rows,
                                .shared = p.weight != nullptr,
                                .dtype = p.dtype,
                                .activation = p.activation,
                                .design = p.design};
  const Chip machine = chip("ffn");
  const Chosen chosen = choose(execution, machine);
  const bool is_general = chosen.path == Path::kGeneral;
  Listing listing{.segments = {}, .stats = is_general ? nullptr : p.stats};
  if (!is_general && is_one_pass(selection, machine)) {
    listing.segments = select_segments(selection, machine, stream);
  } else {
    select(selection, stream);
  }
  execute_chosen(execution, chosen, listing, stream);
  if (p.stats == nullptr || !is_general) return;
  launch("ffn", "count", count_kernel, dim3(1), dim3(1), stream,
         CountParams{.tile = tile,
                     .n_tiles = n_tiles,
                     .stats = p.stats,
                     .batch = p.batch,
                     .n_neurons = p.n_neurons,
                     .tile_rows = p.tile_rows,
                     .shared = p.weight != nullptr});
}

}  // namespace csfast::cuda
