// How the few-bit codes of a neuron's rows lie in memory. Every sensor reads this layout.
//
// A row of d weights becomes d codes u in [0, 2^bits), each standing for the odd integer
// 2 u - (2^bits - 1) times the row's scale. Rows are cut into chunks of 128 channels, the last one
// padded with channels whose activation is zero. A chunk is 16 * bits bytes:
//
//   bits 1   16 bytes: bit i of byte m is channel 8 m + i
//   bits 2   32 bytes: bits 2 s, 2 s + 1 of byte m are channel 32 s + m
//   bits 3   the 2-bit chunk of u & 3, then the 1-bit chunk of u >> 2
//   bits 4   the 2-bit chunk of u & 3, then the 2-bit chunk of u >> 2
//
// so that 32 bytes, shifted by 0 and 2 and then by 4 and 6, are 64 neighbouring channels each time.
// The gate row and the up row of a neuron are neighbours: codes are
// (n_neurons, 2, chunks, 16 * bits).
#pragma once

#include <cstdint>

namespace csfast {

inline constexpr int64_t kChunk = 128;  // channels
inline constexpr int kBitsMax = 4;

constexpr int64_t chunks_of(int64_t d) {
  return (d + kChunk - 1) / kChunk;
}
constexpr int64_t row_bytes(int64_t d, int bits) {
  return chunks_of(d) * 16 * bits;
}

}  // namespace csfast
