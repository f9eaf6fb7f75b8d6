// What one block makes of the neurons that it is given for several rows of the batch at once, on
// the tensor cores: their activations, or the sum of their down rows times these.
//
// Both permute what is summed over alike in both operands, so that a lane loads 16 neighbouring
// bytes of weights and uses all of them. Activations: eight neurons at a time, gate rows and up
// rows of a product together, so that one lane gets both of a neuron; warps share the columns.
// Sums: sixteen neurons at a time, warps have 64 columns each. An activation is two numbers of
// tf32, its leading 11 bits and the next, in the upper and lower half of a product: both go through
// it at once. What a row of the batch gets does not depend on how many others there are.
#pragma once

#include <cstdint>

#include "common/async.cuh"
#include "common/gather.cuh"
#include "common/mma.cuh"
#include "common/usage.cuh"
#include "common/warp.cuh"

namespace csfast::cuda {

inline constexpr int kProductRows = 8;   // of the batch, in a product
inline constexpr int kProductsMax = 2;   // a launch
inline constexpr int kUnitNeurons = 8;   // whose activations are made at once
inline constexpr int kChunkBytes = 64;   // of a row, that four lanes load at once
inline constexpr int kSlotsOfStage = 8;  // chunks of a warp on their way, 128 KB a processor
inline constexpr int kStageChunks = kSlotsOfStage * kGatherWarps;
inline constexpr int kCombineThreads =
    256;                                  // of a block, one on a processor: 255 registers a thread
inline constexpr int kStripColumns = 64;  // of a warp
inline constexpr int kCombineColumns = kCombineThreads / kWarp * kStripColumns;  // of a block
inline constexpr int kStepNeurons = 16;  // that are added at once
// On their way, 48 or 32 KB a processor: what registers allow beside the sums.
template <int kProducts>
constexpr int kStepsAhead = kProducts == 1 ? 3 : 2;
// Of activations in memory from one neuron of the list to the next: rows of the batch.
inline constexpr int kActivationStride = kProductRows * kProductsMax;

template <int kProducts>
struct RowsShared {
  // In turns; by warp, product, gate or up, neuron and pair of rows.
  float2 dot[2][kGatherWarps][kProducts][2][kUnitNeurons][kProductRows / 2];
};

// Writes the activations of the neurons for every row of x (batch, d) to `activation`
// (count, kActivationStride), zeros where there is no neuron. A block of kGatherThreads.
template <typename T, int kProducts>
__device__ __forceinline__ void activate_rows(const Gather& gather, const void* x, int batch,
                                              RowsShared<kProducts>& shared, float* activation) {
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int g = thread % kWarp / 4;
  const int t = thread % 4;
  const int chunks = (gather.row_bytes + kChunkBytes - 1) / kChunkBytes;
  const int stages = (chunks + kStageChunks - 1) / kStageChunks;
  const int units = (gather.count + kUnitNeurons - 1) / kUnitNeurons;
  const uint64_t policy = read_once();
  const auto chunk_of = [&](int stage, int i) {  // two neighbours a warp
    return stage * kStageChunks + i / 2 * (2 * kGatherWarps) + 2 * warp + i % 2;
  };
  const char* x_row[kProducts];  // rows beyond the batch repeat its last
#pragma unroll
  for (int n = 0; n < kProducts; ++n) {
    const int b = min(n * kProductRows + g, batch - 1);
    x_row[n] = static_cast<const char*>(x) + int64_t{b} * gather.row_bytes;
  }

  uint4 gates[kSlotsOfStage];
  uint4 ups[kSlotsOfStage];
  const auto load = [&](int unit, int stage, int i) {  // zeros where there is nothing
    const int j = neuron_at(gather, unit * kUnitNeurons + g);
    const int at = chunk_of(stage, i) * kChunkBytes + 16 * t;
    const int64_t from = int64_t{j} * gather.row_bytes + at;
    gates[i] = make_uint4(0, 0, 0, 0);
    ups[i] = make_uint4(0, 0, 0, 0);
    if (j < 0 || at >= gather.row_bytes) return;
    gates[i] = load_once(gather.gate + from, policy);
    ups[i] = load_once(gather.up + from, policy);
  };
  if (units > 0) {
#pragma unroll
    for (int i = 0; i < kSlotsOfStage; ++i) load(0, 0, i);
  }
  for (int unit = 0; unit < units; ++unit) {
    float c[kProducts][4] = {};
    for (int stage = 0; stage < stages; ++stage) {
      const bool is_last = stage + 1 == stages;
      const int next_unit = is_last ? unit + 1 : unit;
      const int next_stage = is_last ? 0 : stage + 1;
#pragma unroll
      for (int i = 0; i < kSlotsOfStage; ++i) {
        const int chunk = chunk_of(stage, i);
        if (chunk < chunks) {
          const int at = chunk * kChunkBytes + 16 * t;
          const uint32_t first[4] = {gates[i].x, ups[i].x, gates[i].y, ups[i].y};
          const uint32_t second[4] = {gates[i].z, ups[i].z, gates[i].w, ups[i].w};
#pragma unroll
          for (int n = 0; n < kProducts; ++n) {
            uint4 xs = make_uint4(0, 0, 0, 0);
            if (at < gather.row_bytes) xs = *reinterpret_cast<const uint4*>(x_row[n] + at);
            multiply_halves<T>(c[n], first, xs.x, xs.y);
            multiply_halves<T>(c[n], second, xs.z, xs.w);
          }
        }
        if (next_unit < units) load(next_unit, next_stage, i);
      }
    }
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      shared.dot[unit % 2][warp][n][0][g][t] = make_float2(c[n][0], c[n][1]);
      shared.dot[unit % 2][warp][n][1][g][t] = make_float2(c[n][2], c[n][3]);
    }
    // Orders the shares; and whatever threads read of one unit before what they write of the next
    // but one.
    __syncthreads();

    // Add: a thread a neuron and row.
    constexpr int kValues = kUnitNeurons * kProductRows;  // of a product
    const int n = thread / kValues;
    const int neuron = thread % kValues / kProductRows;
    const int b = thread % kProductRows;
    const int position = unit * kUnitNeurons + neuron;
    if (n < kProducts && position < gather.count) {
      float gate = 0.0f;
      float up = 0.0f;
#pragma unroll
      for (int w = 0; w < kGatherWarps; ++w) {
        const float2 gates_of = shared.dot[unit % 2][w][n][0][neuron][b / 2];
        const float2 ups_of = shared.dot[unit % 2][w][n][1][neuron][b / 2];
        gate += b % 2 == 0 ? gates_of.x : gates_of.y;
        up += b % 2 == 0 ? ups_of.x : ups_of.y;
      }
      const int j = gather.neurons[position];
      float a = 0.0f;
      if (j >= 0) {
        if (gather.gate_bias != nullptr) {
          gate += static_cast<float>(static_cast<const T*>(gather.gate_bias)[j]);
        }
        if (gather.up_bias != nullptr) {
          up += static_cast<float>(static_cast<const T*>(gather.up_bias)[j]);
        }
        a = activate(gather.activation, gate) * up;
      }
      activation[position * kActivationStride + n * kProductRows + b] = a;
    }
    __syncwarp();  // the products want whole warps
  }
}

// The leading bits of v, and the next: two numbers of tf32 that are v up to 2^-24 of it. What is
// not finite is all in the first.
__device__ __forceinline__ void split(float v, uint32_t& high, uint32_t& low) {
  const float leading = round_tf32(v);
  const float rest = leading - leading == 0.0f ? round_tf32(v - leading) : 0.0f;
  high = __float_as_uint(leading);
  low = __float_as_uint(rest);
}

// Writes the sums of the neurons' down rows times their activations, (count, kActivationStride), to
// `partial`, for row b of the batch at b * stride: the block's columns, from first_column on. A
// block of kCombineThreads.
template <typename T, int kProducts>
__device__ __forceinline__ void combine_rows(const Gather& gather, const float* activation,
                                             int batch, int first_column, float* partial,
                                             int64_t stride) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int g = static_cast<int>(threadIdx.x) % kWarp / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
  const int width = gather.row_bytes / 2;
  const int strip = first_column + warp * kStripColumns;
  const int at = (strip + kLaneColumns * g) * 2;  // bytes
  const int steps = (gather.count + kStepNeurons - 1) / kStepNeurons;
  const uint64_t policy = read_once();
  constexpr int kAhead = kStepsAhead<kProducts>;

  uint4 rows[kAhead][4];
  float a[kAhead][kProducts][4];
  const auto load = [&](int s, int slot) {  // zeros where there is nothing
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int position = s * kStepNeurons + 4 * i + t;
      const int j = neuron_at(gather, position);
      rows[slot][i] = make_uint4(0, 0, 0, 0);
      if (j >= 0 && at < gather.row_bytes) {
        rows[slot][i] = load_once(gather.down_t + int64_t{j} * gather.row_bytes + at, policy);
      }
#pragma unroll
      for (int n = 0; n < kProducts; ++n) {
        a[slot][n][i] = 0.0f;
        if (j >= 0) a[slot][n][i] = activation[position * kActivationStride + n * kProductRows + g];
      }
    }
  };
  float c[kProducts][kLaneColumns][4] = {};
#pragma unroll
  for (int slot = 0; slot < kAhead; ++slot) load(slot, slot);
  for (int s0 = 0; s0 < steps; s0 += kAhead) {
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t factor[kProducts][4];
#pragma unroll
        for (int n = 0; n < kProducts; ++n) {
          split(a[slot][n][2 * half], factor[n][0], factor[n][1]);
          split(a[slot][n][2 * half + 1], factor[n][2], factor[n][3]);
        }
        float low[kLaneColumns];
        float high[kLaneColumns];
        unpack_all<T>(rows[slot][2 * half], low);
        unpack_all<T>(rows[slot][2 * half + 1], high);
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) {
#pragma unroll
          for (int n = 0; n < kProducts; ++n) {
            multiply_tf32(c[n][i], factor[n], __float_as_uint(low[i]), __float_as_uint(high[i]));
          }
        }
      }
      load(s0 + slot + kAhead, slot);
    }
  }

  // Column 8 m + i of the strip is column m of the product that i counts; of these a lane has
  // 2 t and 2 t + 1.
  const int column = strip + 2 * kLaneColumns * t;
#pragma unroll
  for (int n = 0; n < kProducts; ++n) {
    const int b = n * kProductRows + g;
    if (b >= batch) continue;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (column + k * kLaneColumns >= width) continue;
      float4* to = reinterpret_cast<float4*>(partial + b * stride + column + k * kLaneColumns);
#pragma unroll
      for (int i = 0; i < kLaneColumns; i += 4) {
        to[i / 4] =
            make_float4(c[n][i][k] + c[n][i][k + 2], c[n][i + 1][k] + c[n][i + 1][k + 2],
                        c[n][i + 2][k] + c[n][i + 2][k + 2], c[n][i + 3][k] + c[n][i + 3][k + 2]);
      }
    }
  }
}

}  // namespace csfast::cuda
