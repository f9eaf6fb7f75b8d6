// What compositions need of execute and other operations do not see: lists in pieces, and counters.
#pragma once

#include "common/segment.cuh"
#include "csfast/execute.h"

namespace csfast::cuda {

// Whose list execute takes: p.tile and p.n_tiles, or pieces; and who counts.
struct Listing {
  Segments segments = {};    // of p.n_neurons and p.tile_rows; without blocks p.tile is the list
  int64_t* stats = nullptr;  // (2) or null: += batch, += neurons executed, in all its rows
};

// execute() as `chosen`, which choose() made of p. On kGeneral there are neither pieces nor stats.
void execute_chosen(const ExecuteParams& p, const Chosen& chosen, const Listing& listing,
                    Stream stream);

}  // namespace csfast::cuda
