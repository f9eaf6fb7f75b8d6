// How the work of an operation is shared among threads on the CPU.
#pragma once

#include <cstdint>

namespace csfast {

// Less than this is not worth waking a second thread for: entering and leaving a parallel region
// takes some 5 us, in which one core reads this much.
inline constexpr int64_t kBytesAlone = 64 << 10;

// What a workspace part of `bytes` occupies: the next part starts on a cache line of its own.
constexpr int64_t line_up(int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}

}  // namespace csfast
