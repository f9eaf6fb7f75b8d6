// Select: sense, then recover by threshold with the tiles as groups, in one pass; no intermediate
// leaves the caches.
//
// With a cap, a list that would be longer keeps only the cap[list] tiles of largest usage, as top-k
// of recover.h would: ties go to the lower index, not-a-number ranks as infinity. A scale that is
// not finite keeps everything, whatever the cap.
#pragma once

#include <cstdint>

#include "csfast/design.h"
#include "csfast/layer.h"
#include "csfast/types.h"

namespace csfast {

// `lists` is 1 with weights, otherwise batch.
struct SelectParams {
  Form form;
  Sensor sensor;
  Decision decision;
  const void* x;               // (batch, d), T
  void* workspace;             // select_workspace() bytes, 64-byte aligned
  int32_t* tile;               // (lists, n_tiles_max), written: ascending up to n_tiles, 0 beyond
  int32_t* n_tiles;            // (lists), written
  int32_t* dropped = nullptr;  // (lists), written, or null: tiles that only the cap left out
  float* missed = nullptr;     // (lists), written, or null
  int64_t batch;
  Design design = {};
};

int64_t select_workspace(int64_t batch, int64_t d, int64_t n_neurons, Device device);

// Without a cap equal to recover(sense(x)) with group_rows = tile_rows entry for entry, its groups
// being the tiles; `missed` up to the order of its sum.
void select(const SelectParams& p, Device device, Stream stream);

// What was chosen for select on CUDA.
struct ChosenSelect {
  bool one_pass;         // over the codes, which senses and decides; else usages go through memory
  bool overlaps;         // programmatic launches
  bool quantized;        // by a kernel before, else every block quantises for itself
  int blocks = 0;        // of one pass: a run each
  int run_neurons = 0;   // likewise: of a run, at most
  int shared_bytes = 0;  // likewise: of dynamic shared memory
};

// How CUDA goes about it on `chip`. Looks at sizes and addresses, not at memory.
ChosenSelect choose(const SelectParams& p, const Chip& chip);

namespace cuda {
int64_t select_workspace(int64_t batch, int64_t d, int64_t n_neurons);
void select(const SelectParams& p, Stream stream);
}  // namespace cuda

}  // namespace csfast
