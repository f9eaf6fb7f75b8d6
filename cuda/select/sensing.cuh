// What one block senses of a run of neurons, on the tensor cores: from codes to integers.
//
// A warp takes eight neurons at a time: their gate rows are rows 0 to 7 of a product, their up rows
// rows 8 to 15, so that both measurements of a neuron come out in one lane. The columns are eight
// rows of the batch. Channels are permuted alike in codes and activations, so that a lane reads 16
// neighbouring bytes of codes and uses all of them: half a chunk of planes, or 16 bytes of ternary
// codes. Four lanes read 64 neighbouring bytes of a row: a unit, 256 channels of 2-bit codes.
//
// Of 16 bytes of 2-bit codes 16 operations make 16 words, which are operands of 4 products for each
// 8 rows of the batch: bits stay where they are in their bytes, and sums are as much too large.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/async.cuh"
#include "common/codes.cuh"
#include "common/mma.cuh"
#include "common/quantize.cuh"
#include "common/warp.cuh"
#include "csfast/design.h"
#include "csfast/planes.h"
#include "select/sizes.h"

namespace csfast::cuda {

// Where channel c of an activation is: of planes by unit, pair of bits in the byte, chunk of the
// unit, half, so that the four lanes of a row of codes read 64 neighbouring bytes.
template <Code kCode>
__device__ __forceinline__ int place_of(int c) {
  if constexpr (kCode == Code::kTernary) return c;
  return (c & ~0xe0) | (c << 1 & 0xc0) | (c >> 2 & 0x20);
}

struct SenseShared {
  unsigned peak[kSenseWarps];
  int sum[kSenseWarps];  // of q, by warp
  float scale[kSenseBatch];
};

// Warps that quantise one row of the batch, so that all rows are on their way at once.
__device__ __forceinline__ int row_warps_of(int batch) {
  return batch <= 1 ? 16 : batch <= 2 ? 8 : batch <= 4 ? 4 : batch <= 8 ? 2 : 1;
}
static_assert(kSenseWarps == 16 && kSenseBatch == 16);

// The sum of q of row b, when it is quantised. All lanes of a warp call, each with a row of its own
// choice.
__device__ __forceinline__ int sum_of(const SenseShared& shared, int batch, int b) {
  const int row_warps = row_warps_of(batch);
  int sum = shared.sum[threadIdx.x % kSenseWarps];
  for (int offset = 1; offset < row_warps; offset *= 2) {
    sum += __shfl_xor_sync(kFull, sum, offset);
  }
  return __shfl_sync(kFull, sum, b * row_warps);
}

// Quantises x (batch, d), rows and `equal` at multiples of 16 bytes, d a multiple of 8, to
// q (batch, shared_stride) in shared memory, with the scales and the sums: quantize.cuh, bit for
// bit. The whole block calls; what it wrote may be read at once. Rows are read once if registers
// hold them. Calls meanwhile() when the first of them are on their way, before a barrier.
template <Code kCode, typename T, typename Meanwhile>
__device__ __forceinline__ void quantize_rows(const T* x, const float* equal, int batch, int d,
                                              int8_t* q, SenseShared& shared, Meanwhile meanwhile) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row_warps = row_warps_of(batch);
  const int b = warp / row_warps;
  const int part = warp % row_warps;
  const int channels = b < batch ? static_cast<int>(shared_channels(kCode, d)) : 0;
  const int width = b < batch ? d : 0;
  const int first = 8 * (part * kWarp + lane);
  const int step = 8 * kWarp * row_warps;
  const T* row = x + int64_t{b} * d;
  int8_t* to = q + b * static_cast<int>(shared_stride(kCode, d));

  int sum = 0;
  const auto reduce = [&](unsigned peak) {
    peak = __reduce_max_sync(kFull, peak);
    if (lane == 0) shared.peak[warp] = peak;
    __syncthreads();
    return __reduce_max_sync(kFull, shared.peak[b * row_warps + lane % row_warps]);
  };
  const auto write = [&](int c, const uint2& levels) {
    *reinterpret_cast<uint2*>(to + place_of<kCode>(c)) = levels;
    sum = __dp4a(0x01010101, static_cast<int>(levels.x), sum);
    sum = __dp4a(0x01010101, static_cast<int>(levels.y), sum);
  };
  const unsigned peak =
      quantize_part(row, equal, width, channels, first, step, meanwhile, reduce, write);
  sum = __reduce_add_sync(kFull, sum);
  if (lane == 0) {
    shared.sum[warp] = sum;
    if (part == 0 && b < batch) shared.scale[b] = scale_of(peak);
  }
  __syncthreads();
}

// The same from what a kernel before has quantised: from (batch, q_width) and scale (batch).
template <Code kCode, typename Meanwhile>
__device__ __forceinline__ void copy_rows(const int8_t* from, const float* scale, int batch, int d,
                                          int8_t* q, SenseShared& shared, Meanwhile meanwhile) {
  constexpr int kAtOnce = 4;
  meanwhile();
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row_warps = row_warps_of(batch);
  const int b = warp / row_warps;
  const int part = warp % row_warps;
  const int channels = b < batch ? static_cast<int>(shared_channels(kCode, d)) : 0;
  const int step = 16 * kWarp * row_warps;
  const int8_t* row = from + b * q_width(d);
  int8_t* to = q + b * static_cast<int>(shared_stride(kCode, d));
  int sum = 0;
  for (int first = 16 * (part * kWarp + lane); first < channels; first += kAtOnce * step) {
    uint4 v[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int c = first + i * step;
      v[i] = make_uint4(0, 0, 0, 0);
      if (c < channels) v[i] = *reinterpret_cast<const uint4*>(row + c);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int c = first + i * step;
      if (c < channels) *reinterpret_cast<uint4*>(to + place_of<kCode>(c)) = v[i];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sum = __dp4a(0x01010101, static_cast<int>(word(v[i], k)), sum);
      }
    }
  }
  sum = __reduce_add_sync(kFull, sum);
  if (lane == 0) {
    shared.sum[warp] = sum;
    if (part == 0 && b < batch) shared.scale[b] = scale[b];
  }
  __syncthreads();
}

// What a lane has of one row in one unit.
template <Code kCode>
struct Piece {
  HalfChunk<bits_of(kCode)> codes;
};
template <>
struct Piece<Code::kTernary> {
  uint4 codes;
};

template <Code kCode>
constexpr int units_of(int64_t d) {
  if (kCode == Code::kTernary) return static_cast<int>((row_bytes(d, kCode) + 63) / 64);
  return static_cast<int>((chunks_of(d) + 1) / 2);
}

// Zero where the row has ended.
template <Code kCode>
__device__ __forceinline__ Piece<kCode> load_piece(const uint8_t* row, int unit, int d,
                                                   uint64_t policy) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  Piece<kCode> piece{};
  if constexpr (kCode == Code::kTernary) {
    const int at = 64 * unit + 16 * t;
    if (at < row_bytes(d, kCode)) piece.codes = load_once(row + at, policy);
  } else {
    constexpr int kBits = bits_of(kCode);
    const int chunk = 2 * unit + t / 2;
    const int half = t % 2;
    if (chunk < chunks_of(d)) {
      const uint8_t* from = row + chunk * 16 * kBits;
      if constexpr (kBits > 1) piece.codes.low = load_once(from + 16 * half, policy);
      if constexpr (kBits == 4) piece.codes.high = load_once(from + 32 + 16 * half, policy);
      if constexpr (kBits == 3) piece.codes.high = load_once(from + 32, policy);
      if constexpr (kBits == 1) piece.codes.high = load_once(from, policy);
    }
  }
  return piece;
}

// The next digit of four ternary codes at a time, of what is left of even and odd bytes: see
// measure.cuh.
struct Trits {
  uint32_t even[4];
  uint32_t odd[4];

  __device__ __forceinline__ explicit Trits(const uint4& codes) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      even[k] = word(codes, k) & 0x00ff00ffu;
      odd[k] = word(codes, k) >> 8 & 0x00ff00ffu;
    }
  }
  __device__ __forceinline__ uint32_t next(int k) {
    const uint32_t low = 3 * even[k];
    const uint32_t high = 3 * odd[k];
    even[k] = low & 0x00ff00ffu;
    odd[k] = high & 0x00ff00ffu;
    return __byte_perm(low, high, 0x7351);  // the upper bytes
  }
};

// Sums of a product, a chain of additions each: a product waits some 30 cycles for the one before.
// 2-bit codes have one for each pair of bits of a byte, 4^s times too large for pair s, of a
// quarter of the channels each.
template <Code kCode, int kProducts>
constexpr int kSums = kCode == Code::kBits2 ? 4
                      : kProducts == 1      ? 2
                                            : 1;
static_assert(kSenseWidth / 4 * (3 << 6) * 127 <= INT32_MAX);

// Adds the products of one unit. `q` is where the lane's 16 bytes of the unit begin, in each of its
// rows of the batch; `width` the bytes of a row of ternary codes.
template <Code kCode, int kProducts>
__device__ __forceinline__ void multiply_piece(const Piece<kCode>& gate, const Piece<kCode>& up,
                                               const int8_t* const (&q)[kProducts], int offset,
                                               int width,
                                               int (&y)[kProducts][kSums<kCode, kProducts>][4]) {
  constexpr int kTurns = kSums<kCode, kProducts>;
  const auto load = [&](int at, uint4(&x)[kProducts]) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      x[n] = *reinterpret_cast<const uint4*>(q[n] + offset + at);
    }
  };
  if constexpr (kCode == Code::kTernary) {
    Trits gates(gate.codes);
    Trits ups(up.codes);
#pragma unroll
    for (int digit = 0; digit < kTrits; ++digit) {
      uint4 x[kProducts];
      load(digit * width, x);
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        uint32_t a[4];
        a[0] = gates.next(k);
        a[1] = ups.next(k);
        a[2] = gates.next(k + 1);
        a[3] = ups.next(k + 1);
#pragma unroll
        for (int n = 0; n < kProducts; ++n)
          multiply_bytes(y[n][k / 2 % kTurns], a, word(x[n], k), word(x[n], k + 1));
      }
    }
  } else if constexpr (kCode == Code::kBits2) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint32_t pair = 0x03030303u << (2 * s);
      uint4 x[kProducts];
      load(64 * s, x);
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const uint32_t a[4] = {word(gate.codes.low, k) & pair, word(up.codes.low, k) & pair,
                               word(gate.codes.low, k + 1) & pair,
                               word(up.codes.low, k + 1) & pair};
#pragma unroll
        for (int n = 0; n < kProducts; ++n)
          multiply_bytes(y[n][s], a, word(x[n], k), word(x[n], k + 1));
      }
    }
  } else {
    constexpr int kBits = bits_of(kCode);
    const int half = static_cast<int>(threadIdx.x) % 2;
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      uint4 x[kProducts];
      load(64 * s, x);
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        uint32_t a[4];
        a[0] = static_cast<uint32_t>(four_codes<kBits>(gate.codes, half, s, k));
        a[1] = static_cast<uint32_t>(four_codes<kBits>(up.codes, half, s, k));
        a[2] = static_cast<uint32_t>(four_codes<kBits>(gate.codes, half, s, k + 1));
        a[3] = static_cast<uint32_t>(four_codes<kBits>(up.codes, half, s, k + 1));
#pragma unroll
        for (int n = 0; n < kProducts; ++n)
          multiply_bytes(y[n][k / 2 % kTurns], a, word(x[n], k), word(x[n], k + 1));
      }
    }
  }
}

// A run of neurons and the activations that one block senses.
struct SenseRun {
  const uint8_t* codes;  // (n_neurons, 2, groups, group_bytes)
  int64_t first, end;    // neurons of the run
  int batch, d;
  int8_t* q;  // (batch, shared_stride), in shared memory; quantize() fills it
};

// Measures every neuron of the run for every row of the batch. Calls quantize() once, by the whole
// block, when the first codes are on their way, for it to wait for the kernel before; then write(i,
// b, y_gate, y_up) from one lane for every neuron first + i and row b. Barriers are in quantize()
// only.
template <Code kCode, int kProducts, typename Quantize, typename Write>
__device__ __forceinline__ void sense_run(const SenseRun& run, const SenseShared& shared,
                                          Quantize quantize, Write write) {
  constexpr int kLoads = kCode == Code::kBits3 || kCode == Code::kBits4 ? 2 : 1;  // of a piece
  // In flight, as many again while they are multiplied; what registers allow.
  constexpr bool kIsTight = kProducts > 1 && (kCode == Code::kTernary || kCode == Code::kBits2);
  constexpr int kUnits = kLoads > 1 ? 1 : kIsTight ? 2 : 3;
  struct Stage {
    Piece<kCode> gate[kUnits];
    Piece<kCode> up[kUnits];
  };
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4;
  const int t = lane % 4;
  const int units = units_of<kCode>(run.d);
  const int64_t bytes = row_bytes(run.d, kCode);
  const int width = static_cast<int>(bytes);
  const int stride = static_cast<int>(shared_stride(kCode, run.d));
  const uint64_t policy = read_once();

  int64_t task = run.first + warp * kTaskNeurons;  // that is multiplied
  int unit = 0;
  int64_t task_ahead = task;  // that is loaded
  int unit_ahead = 0;
  const auto load = [&](Stage& stage) {  // and moves on; nothing beyond the run
    const int64_t neuron = min(task_ahead + g, run.end - 1);
    const uint8_t* row = run.codes + 2 * neuron * bytes;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      stage.gate[i] = load_piece<kCode>(row, unit_ahead + i, run.d, policy);
      stage.up[i] = load_piece<kCode>(row + bytes, unit_ahead + i, run.d, policy);
    }
    unit_ahead += kUnits;
    if (unit_ahead < units) return;
    unit_ahead = 0;
    task_ahead += kSenseWarps * kTaskNeurons;
  };

  Stage even;
  Stage odd;
  if (task_ahead < run.end) load(even);
  quantize();

  const int8_t* q[kProducts];  // of the lane's rows of the batch; rows beyond it repeat the last
  int sum[kProducts][2];       // of q of the rows whose products the lane gets
#pragma unroll
  for (int n = 0; n < kProducts; ++n) {
    q[n] = run.q + min(n * kProductColumns + g, run.batch - 1) * stride + 16 * t;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[n][i] = sum_of(shared, run.batch, min(n * kProductColumns + 2 * t + i, run.batch - 1));
    }
  }

  constexpr int kTurns = kSums<kCode, kProducts>;
  int y[kProducts][kTurns][4] = {};
  const auto multiply = [&](const Stage& stage) {  // and moves on
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if (unit + i < units) {
        const int offset = (unit + i) * (kCode == Code::kTernary ? 64 : 256);
        multiply_piece<kCode>(stage.gate[i], stage.up[i], q, offset, width, y);
      }
    }
    unit += kUnits;
    if (unit < units) return;
    constexpr int kFactor = is_planes(kCode) ? 2 : 1;  // a level is kFactor * u - kMost
    constexpr int kMost = is_planes(kCode) ? (1 << bits_of(kCode)) - 1 : 1;
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      int total[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int s = 0; s < kTurns; ++s) {
          total[i] += kCode == Code::kBits2 ? y[n][s][i] >> (2 * s) : y[n][s][i];  // exactly
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int b = n * kProductColumns + 2 * t + i;
        if (b < run.batch && task + g < run.end) {
          write(static_cast<int>(task + g - run.first), b, kFactor * total[i] - kMost * sum[n][i],
                kFactor * total[i + 2] - kMost * sum[n][i]);
        }
      }
    }
#pragma unroll
    for (auto& sums : y) {
#pragma unroll
      for (auto& part : sums) {
#pragma unroll
        for (int i = 0; i < 4; ++i) part[i] = 0;
      }
    }
    unit = 0;
    task += kSenseWarps * kTaskNeurons;
  };
  while (task < run.end) {
    if (task_ahead < run.end) load(odd);
    multiply(even);
    if (task >= run.end) break;
    if (task_ahead < run.end) load(even);
    multiply(odd);
  }
}

}  // namespace csfast::cuda
