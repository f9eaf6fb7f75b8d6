// What one warp reads of codes in planes, and the sums that a lane makes of them.
//
// A lane takes half a chunk at a time, the 64 channels whose 2-bit codes are 16 neighbouring bytes,
// of several rows at once: the activation is then read once for all of them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "csfast/planes.h"

namespace csfast::cuda {

inline constexpr int kMeasureWarps = 8;
inline constexpr int kMeasureNeurons = 2;                 // a warp: four rows, four loads in flight
inline constexpr int kMeasureRows = 2 * kMeasureNeurons;  // gate and up of each

// The codes of one row in one half chunk, as they lie in memory.
template <int kBits>
struct HalfChunk {
  uint4 low;   // bits 2, 3, 4: u & 3 of the half's 64 channels
  uint4 high;  // bits 4: u >> 2 likewise; bits 1, 3: the 1-bit chunk, both halves
};

// `chunk` points to 16 * kBits bytes; `half` is 0 or 1.
template <int kBits>
__device__ __forceinline__ HalfChunk<kBits> load_half(const uint8_t* chunk, int half) {
  const uint4* from = reinterpret_cast<const uint4*>(chunk);
  HalfChunk<kBits> codes{};
  if constexpr (kBits > 1) codes.low = __ldg(from + half);
  if constexpr (kBits == 4) codes.high = __ldg(from + 2 + half);
  if constexpr (kBits == 3) codes.high = __ldg(from + 2);
  if constexpr (kBits == 1) codes.high = __ldg(from);
  return codes;
}

__device__ __forceinline__ uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// One byte each: the codes of channels 32 s + 16 half + 4 k .. + 3 of the chunk.
template <int kBits>
__device__ __forceinline__ int four_codes(const HalfChunk<kBits>& codes, int half, int s, int k) {
  uint32_t u = 0;
  if constexpr (kBits > 1) u = word(codes.low, k) >> (2 * s) & 0x03030303u;
  if constexpr (kBits == 4) u |= (word(codes.high, k) >> (2 * s) & 0x03030303u) << 2;
  if constexpr (kBits == 1 || kBits == 3) {
    const uint32_t nibble = word(codes.high, s) >> (16 * half + 4 * k) & 15u;
    const uint32_t spread = nibble * 0x00204081u & 0x01010101u;  // bit i to byte i
    u |= kBits == 3 ? spread << 2 : spread;
  }
  return static_cast<int>(u);
}

// Adds the sums of u q and of q over channels 32 s + 16 half .. + 15 of a chunk, of kMeasureRows
// rows of codes and of kBatch activations, of which `q` is the first: they lie q_chunks chunks
// apart.
template <int kBits, int kBatch>
__device__ __forceinline__ void add_channels(const HalfChunk<kBits> (&codes)[kMeasureRows],
                                             int chunk, int half, int s, const int8_t* q,
                                             int q_chunks, int (&dot)[kBatch][kMeasureRows],
                                             int (&sum)[kBatch]) {
  uint4 activation[kBatch];
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
    const int8_t* from = q + (b * q_chunks + chunk) * kChunk + 32 * s + 16 * half;
    activation[b] = *reinterpret_cast<const uint4*>(from);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      sum[b] = __dp4a(0x01010101, static_cast<int>(word(activation[b], k)), sum[b]);
    }
#pragma unroll
    for (int r = 0; r < kMeasureRows; ++r) {
      const int u = four_codes<kBits>(codes[r], half, s, k);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        dot[b][r] = __dp4a(u, static_cast<int>(word(activation[b], k)), dot[b][r]);
      }
    }
  }
}

}  // namespace csfast::cuda
