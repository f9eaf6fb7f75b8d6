// The integer half of sensing: the measurements that one warp makes of its neurons.
//
// A lane takes half a chunk of planes at a time (codes.cuh), or the 80 channels of 16 ternary
// bytes, of several rows at once.
#pragma once

#include <cstdint>

#include "common/codes.cuh"
#include "common/warp.cuh"
#include "csfast/planes.h"

namespace csfast::cuda {

// y[b][r] of kBatch activations and the rows at `row`, (kMeasureRows) addresses: in every lane.
template <int kBits, int kBatch>
__device__ __forceinline__ void measure_planes(const uint8_t* const (&row)[kMeasureRows],
                                               const int8_t* q, int chunks,
                                               int (&y)[kBatch][kMeasureRows]) {
  constexpr int kBytes = 16 * kBits;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int q_chunks = chunks + 1;     // q_width
  int dot[kBatch][kMeasureRows] = {};  // sum of u q
  int sum[kBatch] = {};                // sum of q
  for (int unit = lane; unit < 2 * chunks; unit += kWarp) {
    const int chunk = unit / 2;
    const int half = unit % 2;
    HalfChunk<kBits> codes[kMeasureRows];
#pragma unroll
    for (int r = 0; r < kMeasureRows; ++r)
      codes[r] = load_half<kBits>(row[r] + chunk * kBytes, half);

#pragma unroll
    for (int s = 0; s < 4; ++s) {
      add_channels<kBits, kBatch>(codes, chunk, half, s, q, q_chunks, dot, sum);
    }
  }
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
#pragma unroll
    for (int r = 0; r < kMeasureRows; ++r) {
      y[b][r] = __reduce_add_sync(kFull, 2 * dot[b][r] - ((1 << kBits) - 1) * sum[b]);
    }
  }
}

// The same. Every digit takes two multiplications, and a permutation that gathers the quotients.
template <int kBatch>
__device__ __forceinline__ void measure_ternary(const uint8_t* const (&row)[kMeasureRows],
                                                const int8_t* q, int64_t d,
                                                int (&y)[kBatch][kMeasureRows]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t width = row_bytes(d, Code::kTernary);
  const int64_t q_stride = q_width(d);
  int dot[kBatch][kMeasureRows] = {};  // sum of u q
  int sum[kBatch] = {};                // sum of q
  for (int64_t i = 16 * lane; i < width; i += 16 * kWarp) {
    // What is left of bytes 0 and 2, and of 1 and 3, of every word: 16 bits each, so that three
    // times a byte has room.
    uint32_t even[kMeasureRows][4];
    uint32_t odd[kMeasureRows][4];
#pragma unroll
    for (int r = 0; r < kMeasureRows; ++r) {
      const uint4 codes = __ldg(reinterpret_cast<const uint4*>(row[r] + i));
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        even[r][k] = word(codes, k) & 0x00ff00ffu;
        odd[r][k] = word(codes, k) >> 8 & 0x00ff00ffu;
      }
    }

#pragma unroll
    for (int digit = 0; digit < kTrits; ++digit) {
      uint4 activation[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int8_t* from = q + b * q_stride + digit * width + i;
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
          const uint32_t low = 3 * even[r][k];
          const uint32_t high = 3 * odd[r][k];
          const int u = static_cast<int>(__byte_perm(low, high, 0x7351));  // their upper bytes
          even[r][k] = low & 0x00ff00ffu;
          odd[r][k] = high & 0x00ff00ffu;
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
            dot[b][r] = __dp4a(u, static_cast<int>(word(activation[b], k)), dot[b][r]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
#pragma unroll
    for (int r = 0; r < kMeasureRows; ++r) {
      y[b][r] = __reduce_add_sync(kFull, dot[b][r] - sum[b]);
    }
  }
}

// Calls write(b, j, y_gate, y_up) once, from one lane, for every row of the batch and every neuron
// of the calling warp. For a grid of one block per kMeasureWarps * kMeasureNeurons neurons. The
// codes come from memory once for four rows of the batch, and from the caches for the next four.
template <Code kCode, typename Write>
__device__ __forceinline__ void measure_neurons(const uint8_t* codes, const int8_t* q,
                                                int64_t batch, int64_t d, int64_t n_neurons,
                                                Write write) {
  const int chunks = static_cast<int>(chunks_of(d));  // what int32 sums allow is 2^16
  const int64_t bytes = row_bytes(d, kCode);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t first = (int64_t{blockIdx.x} * kMeasureWarps + warp) * kMeasureNeurons;
  if (first >= n_neurons) return;

  const uint8_t* row[kMeasureRows];
#pragma unroll
  for (int r = 0; r < kMeasureRows; ++r) {  // the last warp may measure its last neuron twice
    row[r] = codes + (2 * min(first + r / 2, n_neurons - 1) + r % 2) * bytes;
  }
  const auto measure_from = [&]<int kBatch>(int64_t b0) {
    int y[kBatch][kMeasureRows];
    if constexpr (kCode == Code::kTernary) {
      measure_ternary(row, q + b0 * q_width(d), d, y);
    } else {
      measure_planes<bits_of(kCode)>(row, q + b0 * q_width(d), chunks, y);
    }
    if (lane != 0) return;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int i = 0; i < kMeasureNeurons; ++i) {
        if (first + i < n_neurons) write(b0 + b, first + i, y[b][2 * i], y[b][2 * i + 1]);
      }
    }
  };
  int64_t b = 0;
  for (; b + 4 <= batch; b += 4) measure_from.template operator()<4>(b);
  for (; b < batch; ++b) measure_from.template operator()<1>(b);
}

}  // namespace csfast::cuda
