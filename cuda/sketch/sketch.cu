// Sketch on CUDA: rotate and round every row of the batch, then one block a row tile and row.
//
// Plain: a thread decodes four bytes of a tile, 32 weights, by lookups in shared memory, some ten
// instructions a weight. Bound by these; the codes are read once for every row of the batch.
#include <cstddef>

#include "common/dispatch.cuh"
#include "common/launch.cuh"
#include "common/warp.cuh"
#include "csfast/sketch.h"

namespace csfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWords = kTileBytes / 4;      // of a tile: a row each, four columns
constexpr int kGroups = kThreads / kWords;  // tiles at once

// One block a row of the batch.
template <typename T>
__global__ void __launch_bounds__(kThreads) rotate_kernel(const SketchParams p) {
  __shared__ float most[kThreads];
  __shared__ float odd[kThreads];
  const int64_t b = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + b * p.cols;
  float* z = p.z + b * p.cols;
  int8_t* q = p.q + b * sketch_width(p.cols);
  for (int64_t i = threadIdx.x; i < p.cols; i += kThreads) {
    z[i] = __fmul_rn(static_cast<float>(x[turned_channel(p.turn[i])]),
                     __uint_as_float(turned_scale(p.turn[i])));
  }
  const int64_t block = rotation_block_of(p.cols);
  for (int64_t stride = 1; stride < block; stride *= 2) {
    __syncthreads();  // orders the stage before, which other threads wrote
    for (int64_t i = threadIdx.x; i < p.cols / 2; i += kThreads) {
      const int64_t low = i / stride * 2 * stride + i % stride;
      const float a = z[low], c = z[low + stride];
      z[low] = __fadd_rn(a, c);
      z[low + stride] = __fsub_rn(a, c);
    }
  }
  __syncthreads();  // orders the last stage
  float size = 0.0f, bad = 0.0f;
  for (int64_t i = threadIdx.x; i < p.cols; i += kThreads) {
    size = fmaxf(size, fabsf(z[i]));
    bad += z[i] * 0.0f;  // not-a-number once there is one or an infinity
  }
  most[threadIdx.x] = size;
  odd[threadIdx.x] = bad;
  __syncthreads();
  for (int i = kThreads / 2; i > 0; i /= 2) {
    if (threadIdx.x < i) {
      most[threadIdx.x] = fmaxf(most[threadIdx.x], most[threadIdx.x + i]);
      odd[threadIdx.x] += odd[threadIdx.x + i];
    }
    __syncthreads();
  }
  const bool is_plain = most[0] > 0.0f && odd[0] == 0.0f;
  const float per = is_plain ? __fdiv_rn(127.0f, most[0]) : 0.0f;
  for (int64_t i = threadIdx.x; i < sketch_width(p.cols); i += kThreads) {
    q[i] = is_plain && i < p.cols ? static_cast<int8_t>(__float2int_rn(__fmul_rn(z[i], per))) : 0;
  }
  if (threadIdx.x != 0) return;
  p.scale[b] = is_plain ? __fmul_rn(__fdiv_rn(most[0], 127.0f), rotation_norm_of(block)) : odd[0];
}

// One block a row tile and a row of the batch.
__global__ void __launch_bounds__(kThreads) multiply_kernel(const SketchParams p) {
  __shared__ int8_t table[2 << kTrellisBitsMax];
  __shared__ uint8_t subsets[3][16];
  __shared__ int sums[kGroups][kTrellisRows];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t tile = blockIdx.x;
  const int64_t b = blockIdx.y;
  const int word = thread % kWords;  // a row of every sixteen
  const int64_t tiles = trellis_col_tiles(p.cols);
  const int8_t* q = p.q + b * sketch_width(p.cols);
  constexpr Subsets kOf = subsets_of(polynomials_of(kTrellisMemoryMax));
  if (thread < 48) subsets[thread / 16][thread % 16] = kOf.of[thread / 16][thread % 16];
  float y = 0.0f;  // of the row of this thread, if it has one
  for (int l = 0; l < p.n_levels; ++l) {
    const SketchLevel& level = p.level[l];
    __syncthreads();  // orders the reads of the level before
    if (thread < 2 << level.bits) table[thread] = trellis_value(level.bits, thread);
    __syncthreads();  // orders what other threads wrote
    const int64_t bytes = level.bits * int64_t{kTileBytes};
    int sum[kLaneSteps] = {};
    for (int64_t t = thread / kWords; t < tiles; t += kGroups) {
      const uint8_t* at = level.codes + (tile * tiles + t) * bytes + 4 * word;
      const auto word_of = [&](const uint8_t* from) {
        return *reinterpret_cast<const uint32_t*>(from);
      };
      const uint32_t now = word_of(at);
      const uint32_t one = tile > 0 ? word_of(at - tiles * bytes) : 0;
      const uint32_t two = tile > 1 ? word_of(at - 2 * tiles * bytes) : 0;
      const uint32_t first = level.bits > 1 ? word_of(at + kTileBytes) : 0;
      const uint32_t second = level.bits > 2 ? word_of(at + 2 * kTileBytes) : 0;
      const uint32_t third = level.bits > 3 ? word_of(at + 3 * kTileBytes) : 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int shift = 8 * c + 4 * half;
          const int pairs = subsets[0][now >> shift & 15] ^ subsets[1][one >> shift & 15] ^
                            subsets[2][two >> shift & 15];
          const int x = q[t * kTrellisCols + 4 * half + c];
#pragma unroll
          for (int s = 0; s < kLaneSteps; ++s) {
            const int place = 4 * half + s;
            int raw = 0;
            if (level.bits == 2) raw = first >> (8 * c + raw_bit_of(place)) & 1;
            if (level.bits > 2) raw = (half == 0 ? first : second) >> (8 * c + 2 * s) & 3;
            if (level.bits > 3) raw |= (third >> (8 * c + place) & 1) << 2;
            sum[s] += table[4 * raw + (pairs >> 2 * s & 3)] * x;
          }
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kLaneSteps; ++s) sums[thread / kWords][s * kLanes + word] = sum[s];
    __syncthreads();  // orders all sums before they are read
    const int64_t row = tile * kTrellisRows + thread;
    if (thread < kTrellisRows && row < p.rows) {
      const float step = __uint_as_float(uint32_t{level.step[row]} << 16);
      int total = 0;
      for (int g = 0; g < kGroups; ++g) total += sums[g][thread];
      const float part = __fmul_rn(static_cast<float>(total), step);
      y = l > 0 ? __fadd_rn(y, part) : part;
    }
  }
  const int64_t row = tile * kTrellisRows + thread;
  if (thread < kTrellisRows && row < p.rows) p.y[b * p.rows + row] = __fmul_rn(y, p.scale[b]);
}

}  // namespace

void sketch(const SketchParams& p, Stream stream) {
  dispatch(p.dtype, "sketch", [&]<typename T>() {
    launch("sketch", "rotate", rotate_kernel<T>, dim3(static_cast<unsigned>(p.batch)),
           dim3(kThreads), stream, p);
  });
  const dim3 grid(static_cast<unsigned>(trellis_row_tiles(p.rows)), static_cast<unsigned>(p.batch));
  launch("sketch", "multiply", multiply_kernel, grid, dim3(kThreads), stream, p);
}

}  // namespace csfast::cuda
