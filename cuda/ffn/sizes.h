// What ffn's choice and its kernels both know of the kernel that senses a run and executes what it
// keeps of it.
#pragma once

#include <cstdint>

#include "common/workspace.h"
#include "csfast/planes.h"
#include "execute/sizes.h"
#include "select/sizes.h"

namespace csfast::cuda {

inline constexpr int kRangeOtherBytes = 8 << 10;  // of static shared memory, at most

// The list's place in dynamic shared memory: first come sums, then what sensing takes.
constexpr int64_t range_list_at(Code code, int64_t d, int64_t run_neurons) {
  return kSumBytes<1> + padded(run_bytes(code, 1, d, run_neurons));
}
constexpr int64_t range_bytes(Code code, int64_t d, int64_t run_neurons) {
  return range_list_at(code, d, run_neurons) + run_neurons * int64_t{sizeof(int32_t)};
}

}  // namespace csfast::cuda
