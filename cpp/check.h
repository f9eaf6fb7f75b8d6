// Checks of meaning that several operations share. Each throws std::invalid_argument.
#pragma once

#include <cstdint>

#include "csfast/planes.h"
#include "csfast/types.h"

namespace csfast {

// batch in [0, 65535] (a grid dimension of CUDA), n_neurons >= 1 and batch * n_neurons < 2^31
// (int32 counts everything on the device).
void check_neurons(const char* op, int64_t batch, int64_t n_neurons);

// d in [1, 2^31).
void check_width(const char* op, int64_t d);

// A code that exists, of so many channels that no sum of codes times activations leaves int32.
void check_code(const char* op, int64_t d, Code code);

// tile_rows >= 1.
void check_tile_rows(const char* op, int tile_rows);

// For lists in memory of the host: count[b] is in [0, width], and value[b, 0 .. count[b]) ascends,
// distinct, in [0, width). `name` is what the caller calls the values.
void check_lists(const char* op, const char* name, const int32_t* value, const int32_t* count,
                 int64_t batch, int64_t width);

}  // namespace csfast
