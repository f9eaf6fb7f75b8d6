// The number of a code, and the shape of its tensor (n_neurons, 2, groups, group_bytes).
#pragma once

#include <algorithm>

#include "call.h"
#include "csfast/planes.h"

// One that is no code stays none, for csfast to refuse.
inline csfast::Code code_of(int code) {
  return static_cast<csfast::Code>(std::clamp(code, 0, 255));
}

struct CodeSizes {
  Size groups{"groups"}, bytes{"group_bytes"};  // anything, of a code that is none

  CodeSizes(csfast::Code code, int64_t d) {
    if (!csfast::is_known(code)) return;
    const bool planes = csfast::is_planes(code);
    groups = {planes ? "chunks" : "groups", csfast::groups_of(d, code)};
    bytes = {planes ? "16 * bits" : "16", csfast::group_bytes(code)};
  }
};
