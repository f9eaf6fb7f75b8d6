// What compositions need of select and other operations do not see: the lists in pieces.
#pragma once

#include "common/segment.cuh"
#include "csfast/select.h"

namespace csfast::cuda {

// Whether one pass over the codes senses and decides: up to 16 rows, whose elements lie so that 16
// bytes of them are read at once.
bool is_one_pass(const SelectParams& p, const Chip& chip);

// select() without its outputs, where is_one_pass() and there is no cap: the tiles stay in the
// workspace, in the pieces that are returned.
Segments select_segments(const SelectParams& p, const Chip& chip, Stream stream);

}  // namespace csfast::cuda
