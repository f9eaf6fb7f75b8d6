// What one block makes of the neurons that it is given for several rows of the batch at once, on
// the tensor cores: their activations, or the sum of their down rows times these.
//
// Both permute what is summed over alike in both operands, so that a lane loads neighbouring bytes
// of weights and uses all of them. Activations: eight neurons at a time, gate rows and up rows of a
// product together, so that one lane gets both of a neuron; warps share the columns. Sums: sixteen
// neurons at a time; warps share the columns. An activation is two numbers of tf32, its leading 11
// bits and the next, in the upper and lower half of a product: both go through it at once. What a
// row of the batch gets does not depend on how many others there are.
//
// Rows come straight to registers, or in bulk into a ring in shared memory, a kilobyte of a row at
// a time, which is what it takes to read memory at full speed. Warps take turns at filling it, as a
// copy takes its warp some 20 cycles. Every sum has the same order in both.
#pragma once

#include <cstdint>

#include "common/activate.cuh"
#include "common/async.cuh"
#include "common/mma.cuh"
#include "common/warp.cuh"
#include "execute/gather.cuh"
#include "execute/sizes.h"

namespace csfast::cuda {

inline constexpr int kProductRows = 8;  // of the batch, in a product
inline constexpr int kProductsMax = 2;  // a launch
inline constexpr int kUnitNeurons = 8;  // whose activations are made at once
inline constexpr int kChunkBytes = 64;  // of a row, that four lanes load at once
inline constexpr int kPieceBytes = kGatherWarps * kChunkBytes;  // of a row: a chunk a warp
inline constexpr int kPiecesAhead = 8;  // on their way to registers, 128 KB a processor
// Units that a block multiplies by a piece of x before it goes on to the next: a lane then reads x
// once for all, and 132 blocks have four units or fewer of 4,200 neurons.
inline constexpr int kGroupUnits = 4;
// Rows of a slot are so far apart that eight lanes, four neighbours in two rows, load from all
// banks at once.
inline constexpr int kActivatePitch = kPieceBytes + 64;
inline constexpr int kActivateSlots = 5;  // of 16 rows: 80 KB, four on their way while one is used

inline constexpr int kCombineRegisterThreads = 256;  // of a block: 255 registers a thread
inline constexpr int kCombineBulkThreads = 512;
inline constexpr int kCombineBulkColumns = 4;  // that a lane loads at once, of kLaneColumns
// Steps on their way to registers, 48 or 32 KB a processor: what registers allow beside the sums.
template <int kProducts>
constexpr int kStepsAhead = kProducts == 1 ? 3 : 2;
// As above, for loads of 8 bytes: sixteen lanes, four neighbours in four rows.
inline constexpr int kCombinePitch = 2 * kCombineColumns + 32;
inline constexpr int kCombineSlots = 6;  // of 16 rows: 96 KB, five on their way while one is used
static_assert(kCombineColumns == kCombineRegisterThreads / 4 * kLaneColumns &&
              kCombineColumns == kCombineBulkThreads / 4 * kCombineBulkColumns);

// Activations in memory, of the neurons of a list: in registers' way (count, kActivationStride)
// numbers, by row of the batch; in the rings' way those of the products at work, split.
inline constexpr int kActivationStride = kProductRows * kProductsMax;
template <int kProducts>
struct SplitActivations {
  float2 at[kProducts * kProductRows];  // of a neuron; by place_of_row()
};

// Where the activation of row b of the batch lies: turned from one place in the list to the next,
// so that sixteen lanes, four rows of four neighbours, load from all banks at once.
template <int kProducts>
__device__ __forceinline__ int place_of_row(int64_t place, int b) {
  return (b + 2 * kProducts * static_cast<int>(place % 4)) % (kProducts * kProductRows);
}

// The leading bits of v, and the next: two numbers of tf32 that are v up to 2^-24 of it. What is
// not finite is all in the first.
__device__ __forceinline__ float2 split(float v) {
  const float leading = round_tf32(v);
  const float rest = leading - leading == 0.0f ? round_tf32(v - leading) : 0.0f;
  return make_float2(leading, rest);
}

// The warps' shares of the dot products of a unit.
template <int kProducts>
struct UnitDots {
  // By warp, product, gate or up, neuron and pair of rows.
  float2 at[kGatherWarps][kProducts][2][kUnitNeurons][kProductRows / 2];
};

template <int kProducts>
struct ActivateRegister {
  UnitDots<kProducts> dot[2];  // in turns
};

template <int kProducts>
struct alignas(128) ActivateBulk {
  char row[kActivateSlots][2 * kUnitNeurons][kActivatePitch];  // gate rows, then up rows
  UnitDots<kProducts> dot[kGroupUnits];
  Arrival full[kActivateSlots];
  Arrival empty[kActivateSlots];  // of all warps

  // By one thread, before a barrier of the block.
  __device__ __forceinline__ void init() {
    init_arrivals(full, kActivateSlots);
    init_arrivals(empty, kActivateSlots, kGatherWarps);
  }
};

template <int kProducts>
struct alignas(128) CombineBulk {
  struct Slot {
    char row[kStepNeurons][kCombinePitch];
    SplitActivations<kProducts> activation[kStepNeurons];
  };
  Slot slot[kCombineSlots];
  Arrival full[kCombineSlots];    // announced twice: rows, and activations when these are there
  Arrival empty[kCombineSlots];   // of all warps
  uint32_t there[kCombineSlots];  // bit i: whether there is a neuron in place i of the step

  // By one thread, before a barrier of the block.
  __device__ __forceinline__ void init() {
    init_arrivals(full, kCombineSlots, 2);
    init_arrivals(empty, kCombineSlots, kCombineBulkThreads / kWarp);
  }
};

// The calling lane's row of x (batch, d) in each product; rows beyond the batch repeat its last.
template <int kProducts>
__device__ __forceinline__ void find_x(const void* x, int batch, int row_bytes,
                                       const char* (&x_row)[kProducts]) {
  const int g = static_cast<int>(threadIdx.x) % kWarp / 4;
#pragma unroll
  for (int n = 0; n < kProducts; ++n) {
    const int b = min(n * kProductRows + g, batch - 1);
    x_row[n] = static_cast<const char*>(x) + int64_t{b} * row_bytes;
  }
}

// Adds to c the products of a chunk.
template <typename T, int kProducts>
__device__ __forceinline__ void multiply_chunk(const uint4& gates, const uint4& ups,
                                               const uint4 (&xs)[kProducts],
                                               float (&c)[kProducts][4]) {
  const uint32_t first[4] = {gates.x, ups.x, gates.y, ups.y};
  const uint32_t second[4] = {gates.z, ups.z, gates.w, ups.w};
#pragma unroll
  for (int n = 0; n < kProducts; ++n) {
    multiply_halves<T>(c[n], first, xs[n].x, xs[n].y);
    multiply_halves<T>(c[n], second, xs[n].z, xs[n].w);
  }
}

template <int kProducts>
__device__ __forceinline__ void share_dots(const float (&c)[kProducts][4],
                                           UnitDots<kProducts>& dot) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int g = static_cast<int>(threadIdx.x) % kWarp / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int n = 0; n < kProducts; ++n) {
    dot.at[warp][n][0][g][t] = make_float2(c[n][0], c[n][1]);
    dot.at[warp][n][1][g][t] = make_float2(c[n][2], c[n][3]);
  }
}

// Threads that finish a unit: one a neuron and row.
template <int kProducts>
constexpr int kFinishThreads = kProducts * kUnitNeurons * kProductRows;

// Calls put(position, row of the batch, activation) for one neuron of a unit, by thread `thread` of
// its kFinishThreads: adds the shares up, in the order of the warps.
template <typename T, int kProducts, typename Put>
__device__ __forceinline__ void finish_unit(const Gather& gather, const UnitDots<kProducts>& dot,
                                            int unit, int thread, Put put) {
  const int n = thread / (kUnitNeurons * kProductRows);
  const int neuron = thread / kProductRows % kUnitNeurons;
  const int b = thread % kProductRows;
  const int position = unit * kUnitNeurons + neuron;
  if (position >= gather.count) return;
  float gate = 0.0f;
  float up = 0.0f;
#pragma unroll
  for (int w = 0; w < kGatherWarps; ++w) {
    const float2 gates_of = dot.at[w][n][0][neuron][b / 2];
    const float2 ups_of = dot.at[w][n][1][neuron][b / 2];
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
  put(position, n * kProductRows + b, a);
}

// Writes the activations of the neurons for every row of x (batch, d) to `activation`
// (count, kActivationStride), zeros where there is no neuron. A block of kGatherThreads.
template <typename T, int kProducts>
__device__ __forceinline__ void activate_register(const Gather& gather, const void* x, int batch,
                                                  ActivateRegister<kProducts>& shared,
                                                  float* activation) {
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int g = thread % kWarp / 4;
  const int t = thread % 4;
  const int pieces = (gather.row_bytes + kPieceBytes - 1) / kPieceBytes;
  const int stages = (pieces + kPiecesAhead - 1) / kPiecesAhead;
  const int units = (gather.count + kUnitNeurons - 1) / kUnitNeurons;
  const uint64_t policy = read_once();
  const char* x_row[kProducts];
  find_x(x, batch, gather.row_bytes, x_row);

  const auto chunk_of = [&](int stage, int i) {  // bytes
    return (stage * kPiecesAhead + i) * kPieceBytes + warp * kChunkBytes;
  };
  uint4 gates[kPiecesAhead];
  uint4 ups[kPiecesAhead];
  const auto load = [&](int unit, int stage, int i) {  // zeros where there is nothing
    const int j = neuron_at(gather, unit * kUnitNeurons + g);
    const int at = chunk_of(stage, i) + 16 * t;
    const int64_t from = int64_t{j} * gather.row_bytes + at;
    gates[i] = make_uint4(0, 0, 0, 0);
    ups[i] = make_uint4(0, 0, 0, 0);
    if (j < 0 || at >= gather.row_bytes) return;
    gates[i] = load_once(gather.gate + from, policy);
    ups[i] = load_once(gather.up + from, policy);
  };
  if (units > 0) {
#pragma unroll
    for (int i = 0; i < kPiecesAhead; ++i) load(0, 0, i);
  }
  for (int unit = 0; unit < units; ++unit) {
    float c[kProducts][4] = {};
    for (int stage = 0; stage < stages; ++stage) {
      const bool is_last = stage + 1 == stages;
      const int next_unit = is_last ? unit + 1 : unit;
      const int next_stage = is_last ? 0 : stage + 1;
#pragma unroll
      for (int i = 0; i < kPiecesAhead; ++i) {
        if (chunk_of(stage, i) < gather.row_bytes) {
          const int at = chunk_of(stage, i) + 16 * t;
          uint4 xs[kProducts];
#pragma unroll
          for (int n = 0; n < kProducts; ++n) {
            xs[n] = make_uint4(0, 0, 0, 0);
            if (at < gather.row_bytes) xs[n] = *reinterpret_cast<const uint4*>(x_row[n] + at);
          }
          multiply_chunk<T>(gates[i], ups[i], xs, c);
        }
        if (next_unit < units) load(next_unit, next_stage, i);
      }
    }
    share_dots(c, shared.dot[unit % 2]);
    // Orders the shares; and whatever threads read of one unit before what they write of the next
    // but one.
    __syncthreads();
    if (thread < kFinishThreads<kProducts>) {
      finish_unit<T>(gather, shared.dot[unit % 2], unit, thread, [&](int position, int b, float a) {
        activation[position * kActivationStride + b] = a;
      });
    }
    __syncwarp();  // the products want whole warps
  }
}

// The same through the ring, of units in groups; to `activation`, which is of the whole list, from
// place `first` on. Rows that are not there are not copied: what the slot held before goes through
// the products in their place, to sums that nobody adds up.
template <typename T, int kProducts>
__device__ __forceinline__ void activate_bulk(const Gather& gather, const void* x, int batch,
                                              ActivateBulk<kProducts>& shared, int64_t first,
                                              SplitActivations<kProducts>* activation) {
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const int g = lane / 4;
  const int t = lane % 4;
  const int pieces = (gather.row_bytes + kPieceBytes - 1) / kPieceBytes;
  const int units = (gather.count + kUnitNeurons - 1) / kUnitNeurons;
  const int steps = units * pieces;
  const uint64_t policy = read_once();
  const char* x_row[kProducts];
  find_x(x, batch, gather.row_bytes, x_row);

  int next_group = 0;  // what is copied next: its first unit
  int next_piece = 0;
  int next_unit = 0;                      // of the group
  const auto copy_next = [&](int slot) {  // by one warp
    const int position = (next_group + next_unit) * kUnitNeurons + lane % kUnitNeurons;
    const int j = lane < 2 * kUnitNeurons ? neuron_at(gather, position) : -1;
    const int at = next_piece * kPieceBytes;
    const int bytes = min(kPieceBytes, gather.row_bytes - at);
    const int there = __popc(__ballot_sync(kFull, j >= 0));
    if (lane == 0) expect(shared.full + slot, there * bytes);
    __syncwarp();  // announced before any of it comes
    if (j >= 0) {
      const char* rows = lane < kUnitNeurons ? gather.gate : gather.up;
      copy_bulk(shared.row[slot][lane], rows + int64_t{j} * gather.row_bytes + at, bytes,
                shared.full + slot, policy);
    }
    __syncwarp();
  };
  const auto go_on = [&] {  // by all
    if (++next_unit < min(kGroupUnits, units - next_group)) return;
    next_unit = 0;
    if (++next_piece < pieces) return;
    next_piece = 0;
    next_group += kGroupUnits;
  };
  for (int s = 0; s < min(steps, kActivateSlots); ++s) {
    if (warp == s) copy_next(s);
    go_on();
  }

  uint4 ahead[kProducts];
  const auto load_x = [&](int piece) {  // zeros beyond the row
    const int at = piece * kPieceBytes + warp * kChunkBytes + 16 * t;
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      ahead[n] = make_uint4(0, 0, 0, 0);
      if (at < gather.row_bytes) ahead[n] = *reinterpret_cast<const uint4*>(x_row[n] + at);
    }
  };
  load_x(0);
  int s = 0;
  for (int group = 0; group < units; group += kGroupUnits) {
    const int here = min(kGroupUnits, units - group);
    float c[kGroupUnits][kProducts][4] = {};
    for (int piece = 0; piece < pieces; ++piece) {
      uint4 xs[kProducts];
#pragma unroll
      for (int n = 0; n < kProducts; ++n) xs[n] = ahead[n];
      load_x(piece + 1 < pieces ? piece + 1 : 0);
      const int of_row = gather.row_bytes - piece * kPieceBytes;  // bytes from the piece on
      const int of_piece = warp * kChunkBytes + 16 * t;
#pragma unroll
      for (int u = 0; u < kGroupUnits; ++u) {
        if (u >= here) continue;
        const int slot = s % kActivateSlots;
        wait(shared.full + slot, s / kActivateSlots % 2);
        if (warp * kChunkBytes < of_row) {
          uint4 gates = make_uint4(0, 0, 0, 0);
          uint4 ups = make_uint4(0, 0, 0, 0);
          if (of_piece < of_row) {
            const auto& row = shared.row[slot];
            gates = *reinterpret_cast<const uint4*>(row[g] + of_piece);
            ups = *reinterpret_cast<const uint4*>(row[kUnitNeurons + g] + of_piece);
          }
          multiply_chunk<T>(gates, ups, xs, c[u]);
        }
        __syncwarp();  // all lanes have loaded
        if (lane == 0) arrive(shared.empty + slot);
        // Everyone is past the step before, or soon is, and its slot may be filled again.
        if (s > 0 && s - 1 + kActivateSlots < steps) {
          if (warp == s % kGatherWarps) {
            const int before = (s - 1) % kActivateSlots;
            wait(shared.empty + before, (s - 1) / kActivateSlots % 2);
            copy_next(before);
          }
          go_on();
        }
        ++s;
      }
    }
#pragma unroll
    for (int u = 0; u < kGroupUnits; ++u) {
      if (u < here) share_dots(c[u], shared.dot[u]);
    }
    __syncthreads();
    constexpr int kThreads = kFinishThreads<kProducts>;
    static_assert(kGroupUnits * kThreads <= kGatherThreads);
    const int u = thread / kThreads;
    if (u < here) {
      finish_unit<T>(gather, shared.dot[u], group + u, thread % kThreads,
                     [&](int position, int b, float a) {
                       const int64_t place = first + position;
                       activation[place].at[place_of_row<kProducts>(place, b)] = split(a);
                     });
    }
    __syncthreads();  // everyone has read the shares of this group; and warps are whole again
  }
}

// Adds to c the products of eight neurons, of which a lane has two: `low` and `high`, its columns
// of their down rows, and their activations, split.
template <typename T, int kProducts, int kColumns>
__device__ __forceinline__ void multiply_down(const uint32_t (&low)[kColumns / 2],
                                              const uint32_t (&high)[kColumns / 2],
                                              const float2 (&a)[kProducts][2],
                                              float (&c)[kProducts][kColumns][4]) {
  uint32_t factor[kProducts][4];
#pragma unroll
  for (int n = 0; n < kProducts; ++n) {
    factor[n][0] = __float_as_uint(a[n][0].x);
    factor[n][1] = __float_as_uint(a[n][0].y);
    factor[n][2] = __float_as_uint(a[n][1].x);
    factor[n][3] = __float_as_uint(a[n][1].y);
  }
#pragma unroll
  for (int i = 0; i < kColumns; i += 2) {
    const float2 lows = unpack<T>(low[i / 2]);
    const float2 highs = unpack<T>(high[i / 2]);
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      multiply_tf32(c[n][i], factor[n], __float_as_uint(lows.x), __float_as_uint(highs.x));
      multiply_tf32(c[n][i + 1], factor[n], __float_as_uint(lows.y), __float_as_uint(highs.y));
    }
  }
}

// Writes a warp's sums, of kColumns columns a lane from column `strip` on, to `partial`, for row b
// of the batch at b * stride; of `width` columns in all.
template <int kProducts, int kColumns>
__device__ __forceinline__ void write_strip(const float (&c)[kProducts][kColumns][4], int batch,
                                            int strip, int width, float* partial, int64_t stride) {
  const int g = static_cast<int>(threadIdx.x) % kWarp / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
  // Column kColumns m + i of the strip is column m of the product that i counts; of these a lane
  // has 2 t and 2 t + 1.
  const int column = strip + 2 * kColumns * t;
#pragma unroll
  for (int n = 0; n < kProducts; ++n) {
    const int b = n * kProductRows + g;
    if (b >= batch) continue;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (column + k * kColumns >= width) continue;
      float4* to = reinterpret_cast<float4*>(partial + b * stride + column + k * kColumns);
#pragma unroll
      for (int i = 0; i < kColumns; i += 4) {
        to[i / 4] =
            make_float4(c[n][i][k] + c[n][i][k + 2], c[n][i + 1][k] + c[n][i + 1][k + 2],
                        c[n][i + 2][k] + c[n][i + 2][k + 2], c[n][i + 3][k] + c[n][i + 3][k + 2]);
      }
    }
  }
}

// Writes the sums of the neurons' down rows times their activations, (count, kActivationStride), to
// `partial`, for row b of the batch at b * stride: the block's columns, from first_column on. A
// block of kCombineRegisterThreads.
template <typename T, int kProducts>
__device__ __forceinline__ void combine_register(const Gather& gather, const float* activation,
                                                 int batch, int first_column, float* partial,
                                                 int64_t stride) {
  constexpr int kStrip = kWarp / 4 * kLaneColumns;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int g = static_cast<int>(threadIdx.x) % kWarp / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
  const int strip = first_column + warp * kStrip;
  const int at = (strip + kLaneColumns * g) * 2;  // bytes
  const int steps = (gather.count + kStepNeurons - 1) / kStepNeurons;
  const uint64_t policy = read_once();
  constexpr int kAhead = kStepsAhead<kProducts>;

  uint32_t rows[kAhead][4][kLaneColumns / 2];
  float a[kAhead][2][kProducts][2];
  const auto load = [&](int s, int slot) {  // zeros where there is nothing
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int position = s * kStepNeurons + 4 * i + t;
      const int j = neuron_at(gather, position);
      uint4 v = make_uint4(0, 0, 0, 0);
      if (j >= 0 && at < gather.row_bytes) {
        v = load_once(gather.down_t + int64_t{j} * gather.row_bytes + at, policy);
      }
      rows[slot][i][0] = v.x;
      rows[slot][i][1] = v.y;
      rows[slot][i][2] = v.z;
      rows[slot][i][3] = v.w;
#pragma unroll
      for (int n = 0; n < kProducts; ++n) {
        float& to = a[slot][i / 2][n][i % 2];
        to = 0.0f;
        if (j >= 0) to = activation[position * kActivationStride + n * kProductRows + g];
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
        float2 both[kProducts][2];
#pragma unroll
        for (int n = 0; n < kProducts; ++n) {
          both[n][0] = split(a[slot][half][n][0]);
          both[n][1] = split(a[slot][half][n][1]);
        }
        multiply_down<T, kProducts, kLaneColumns>(rows[slot][2 * half], rows[slot][2 * half + 1],
                                                  both, c);
      }
      load(s0 + slot + kAhead, slot);
    }
  }
  write_strip(c, batch, strip, gather.row_bytes / 2, partial, stride);
}

// The same through the ring, by a block of kCombineBulkThreads; `activation` is of the whole list,
// whose places from `first` on the neurons have. Calls wait_for_prior() between the rows, which
// need the list only, and activations. Rows that are not there are neither copied nor read.
template <typename T, int kProducts>
__device__ __forceinline__ void combine_bulk(const Gather& gather, int64_t first,
                                             const SplitActivations<kProducts>* activation,
                                             int batch, int first_column,
                                             CombineBulk<kProducts>& shared, float* partial,
                                             int64_t stride) {
  constexpr int kWarps = kCombineBulkThreads / kWarp;
  constexpr int kColumns = kCombineBulkColumns;
  constexpr int kStrip = kWarp / 4 * kColumns;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4;
  const int t = lane % 4;
  const int strip = warp * kStrip;            // of the block's columns
  const int at = (strip + kColumns * g) * 2;  // bytes
  const int bytes = min(2 * kCombineColumns, gather.row_bytes - 2 * first_column);
  const int steps = (gather.count + kStepNeurons - 1) / kStepNeurons;
  const uint64_t policy = read_once();

  const auto copy_rows = [&](int s) {  // by one warp
    const int slot = s % kCombineSlots;
    const int j = lane < kStepNeurons ? neuron_at(gather, s * kStepNeurons + lane) : -1;
    const uint32_t there = __ballot_sync(kFull, j >= 0);
    if (lane == 0) {
      shared.there[slot] = there;
      expect(shared.full + slot, __popc(there) * bytes);
    }
    __syncwarp();  // announced before any of it comes
    if (j >= 0) {
      copy_bulk(shared.slot[slot].row[lane],
                gather.down_t + int64_t{j} * gather.row_bytes + 2 * first_column, bytes,
                shared.full + slot, policy);
    }
    __syncwarp();
  };
  const auto copy_activations = [&](int s) {  // by one lane
    const int slot = s % kCombineSlots;
    const int n = min(kStepNeurons, gather.count - s * kStepNeurons);
    const int size = n * int{sizeof(SplitActivations<kProducts>)};
    expect(shared.full + slot, size);
    copy_bulk(shared.slot[slot].activation, activation + first + s * kStepNeurons, size,
              shared.full + slot, policy);
  };
  const bool is_first = warp < min(steps, kCombineSlots);
  if (is_first) copy_rows(warp);
  wait_for_prior();
  if (is_first && lane == 0) copy_activations(warp);
  __syncwarp();

  int of_neuron[kProducts];  // steps are multiples of four
#pragma unroll
  for (int n = 0; n < kProducts; ++n) {
    of_neuron[n] = place_of_row<kProducts>(first + t, n * kProductRows + g);
  }
  float c[kProducts][kColumns][4] = {};
  for (int s = 0; s < steps; ++s) {
    const int slot = s % kCombineSlots;
    const auto& of_step = shared.slot[slot];
    wait(shared.full + slot, s / kCombineSlots % 2);
    const uint32_t there = shared.there[slot] >> t;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t rows[2][kColumns / 2];
      float2 a[kProducts][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int place = 8 * half + 4 * i;  // plus t
        const bool is_there = (there >> place & 1) != 0;
        uint2 v = make_uint2(0, 0);
        if (is_there && at < bytes) {
          v = *reinterpret_cast<const uint2*>(of_step.row[place + t] + at);
        }
        rows[i][0] = v.x;
        rows[i][1] = v.y;
#pragma unroll
        for (int n = 0; n < kProducts; ++n) {
          a[n][i] = make_float2(0.0f, 0.0f);
          if (is_there) a[n][i] = of_step.activation[place + t].at[of_neuron[n]];
        }
      }
      multiply_down<T, kProducts, kColumns>(rows[0], rows[1], a, c);
    }
    __syncwarp();  // all lanes have loaded
    if (lane == 0) arrive(shared.empty + slot);
    // Everyone is past the step before, or soon is, and its slot may be filled again.
    if (warp == s % kWarps && s > 0 && s - 1 + kCombineSlots < steps) {
      wait(shared.empty + (s - 1) % kCombineSlots, (s - 1) / kCombineSlots % 2);
      copy_rows(s - 1 + kCombineSlots);
      if (lane == 0) copy_activations(s - 1 + kCombineSlots);
      __syncwarp();
    }
  }
  write_strip(c, batch, first_column + strip, gather.row_bytes / 2, partial, stride);
}

}  // namespace csfast::cuda
