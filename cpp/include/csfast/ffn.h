// Ffn: a complete feed-forward layer, select + execute, as a decode step calls it.
#pragma once

#include <cstdint>
#include <string>

#include "csfast/design.h"
#include "csfast/execute.h"
#include "csfast/layer.h"
#include "csfast/prepared.h"
#include "csfast/select.h"
#include "csfast/types.h"

namespace csfast {

struct FfnParams {
  Layer layer;
  const void* x;               // (batch, d), T
  void* workspace;             // ffn_workspace() bytes, 64-byte aligned
  void* out;                   // (batch, d), T, written
  int64_t* stats = nullptr;    // (2) or null: += batch, += neurons executed, in all its rows
  int64_t* dropped = nullptr;  // (1) or null: += tiles that only the cap left out
  int64_t batch;
  Design design = {};

  // What either half of it does, by the list (lists, n_tiles_max) and n_tiles (lists) that select
  // writes and execute reads. `workspace` of either is the caller's.
  SelectParams selection(void* workspace, int32_t* tile, int32_t* n_tiles, int32_t* dropped) const {
    return {.form = layer.form,
            .sensor = layer.sensor,
            .decision = layer.decision,
            .x = x,
            .workspace = workspace,
            .tile = tile,
            .n_tiles = n_tiles,
            .dropped = dropped,
            .batch = batch,
            .design = design};
  }
  ExecuteParams execution(void* workspace, const int32_t* tile, const int32_t* n_tiles) const {
    return {.form = layer.form,
            .weights = layer.weights,
            .x = x,
            .tile = tile,
            .n_tiles = n_tiles,
            .workspace = workspace,
            .out = out,
            .batch = batch,
            .tile_rows = layer.decision.tile_rows,
            .shared = is_joint(),
            .design = design};
  }
  // One list, which every row of the batch executes.
  bool is_joint() const { return layer.decision.votes != nullptr; }
};

int64_t ffn_workspace(int64_t batch, int64_t d, int64_t n_neurons, Device device);

// Equal to execute(select(x)) bit for bit.
void ffn(const FfnParams& p, Device device, Stream stream);

// What was chosen for ffn on CUDA.
struct ChosenFfn {
  ChosenSelect select;
  Chosen execute;
  bool piecewise = false;  // execute takes the list in the pieces that select's runs leave of it
  bool immediate = false;  // one kernel senses a run and executes what it keeps of it
  int shared_bytes = 0;    // of that kernel's dynamic shared memory
};

// How CUDA goes about it on `chip`. Looks at sizes and addresses, not at memory.
ChosenFfn choose(const FfnParams& p, const Chip& chip);

// For example "immediate range register overlapping blocks=132 group_threads=512 vectors=1".
std::string to_string(const ChosenFfn& chosen);

namespace cuda {
int64_t ffn_workspace(int64_t batch, int64_t d, int64_t n_neurons);
void ffn(const FfnParams& p, Stream stream);
// The same for any x, at a multiple of 16 bytes, and any out, on the device where the layer lies;
// those of p are of no account.
Prepared prepare(const FfnParams& p);
Replay replay(const FfnParams& p);
}  // namespace cuda

}  // namespace csfast
