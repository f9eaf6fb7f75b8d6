// Nested on CUDA: quantise the activation, then for every level one warp per two neurons.
//
// Reads a level once, n_neurons * 2 * (row_bytes + step_groups), which bounds it; a lane takes 16
// bytes of every plane of a row at a time, half of either group of a chunk. The activation stays in
// the L1 cache.
#include "common/codes.cuh"
#include "common/dispatch.cuh"
#include "common/launch.cuh"
#include "common/quantize.cuh"
#include "common/warp.cuh"
#include "csfast/nested.h"

namespace csfast::cuda {
namespace {

constexpr int kRows = 2;    // of the batch at once: the sums of four would take the registers
constexpr int kBlocks = 2;  // that two blocks on an SM leave each thread, 128

struct LevelParams {
  NestedLevel level;
  const int8_t* q;  // (batch, q_width)
  float* y;         // (batch, n_neurons, 2), written
  int64_t batch, d, n_neurons;
  bool more;  // y holds the levels before
};

// The rows that a warp measures.
struct LevelRows {
  const uint8_t* codes[kMeasureRows];
  const uint8_t* exponent[kMeasureRows];
};

__device__ __forceinline__ float to_float(uint16_t bfloat16) {
  return __uint_as_float(uint32_t{bfloat16} << 16);
}

// s[b][r] of kBatch activations, see nested.h: in every lane. `mantissa` is (kStepOctave).
template <int kBits, int kBatch>
__device__ __forceinline__ void sum_groups(const LevelRows& rows, const float* mantissa,
                                           const int8_t* q, int64_t d,
                                           float (&s)[kBatch][kMeasureRows]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int chunks = static_cast<int>(chunks_of(d));  // at most 2^24
  const int q_chunks = chunks + 1;                    // q_width
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
#pragma unroll
    for (int r = 0; r < kMeasureRows; ++r) s[b][r] = 0.0f;
  }
  for (int unit = lane; unit < 2 * chunks; unit += kWarp) {
    const int chunk = unit / 2;
    const int half = unit % 2;
    HalfChunk<kBits> codes[kMeasureRows];
    uchar2 exponent[kMeasureRows];  // of the chunk's two groups
#pragma unroll
    for (int r = 0; r < kMeasureRows; ++r) {
      codes[r] = load_half<kBits>(rows.codes[r] + chunk * (16 * kBits), half);
      exponent[r] = __ldg(reinterpret_cast<const uchar2*>(rows.exponent[r]) + chunk);
    }

#pragma unroll
    for (int g = 0; g < 2; ++g) {
      int dot[kBatch][kMeasureRows] = {};  // sum of u q
      int sum[kBatch] = {};                // sum of q
#pragma unroll
      for (int i = 2 * g; i < 2 * g + 2; ++i) {
        add_channels<kBits, kBatch>(codes, chunk, half, i, q, q_chunks, dot, sum);
      }
#pragma unroll
      for (int r = 0; r < kMeasureRows; ++r) {
        const int e = g == 0 ? exponent[r].x : exponent[r].y;
        const float factor = factor_of(mantissa[e % kStepOctave], e);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int n = 2 * dot[b][r] - ((1 << kBits) - 1) * sum[b];
          s[b][r] = fmaf(factor, __int2float_rn(n), s[b][r]);
        }
      }
    }
  }
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
#pragma unroll
    for (int r = 0; r < kMeasureRows; ++r) s[b][r] = warp_sum(s[b][r]);
  }
}

template <int kBits>
__global__ void __launch_bounds__(kMeasureWarps* kWarp, kBlocks) level_kernel(const LevelParams p) {
  __shared__ float mantissa[kStepOctave];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first = (int64_t{blockIdx.x} * kMeasureWarps + thread / kWarp) * kMeasureNeurons;
  const int64_t code_bytes = chunks_of(p.d) * (16 * kBits);

  if (thread < kStepOctave) mantissa[thread] = mantissa_of(thread);
  __syncthreads();
  if (first >= p.n_neurons) return;  // the whole warp

  LevelRows rows;
#pragma unroll
  for (int r = 0; r < kMeasureRows; ++r) {  // the last warp may measure its last neuron twice
    const int64_t row = 2 * min(first + r / 2, p.n_neurons - 1) + r % 2;
    rows.codes[r] = p.level.codes + row * code_bytes;
    rows.exponent[r] = p.level.exponent + row * step_groups_of(p.d);
  }
  const auto measure_from = [&]<int kBatch>(int64_t b0) {
    float s[kBatch][kMeasureRows];
    sum_groups<kBits, kBatch>(rows, mantissa, p.q + b0 * q_width(p.d), p.d, s);
    if (thread % kWarp != 0) return;
#pragma unroll
    for (int i = 0; i < kMeasureNeurons; ++i) {
      const int64_t j = first + i;
      if (j >= p.n_neurons) break;
      const float gate = 0.5f * to_float(p.level.top[2 * j]);
      const float up = 0.5f * to_float(p.level.top[2 * j + 1]);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        float2* y = reinterpret_cast<float2*>(p.y) + (b0 + b) * p.n_neurons + j;
        float2 sum = make_float2(__fmul_rn(gate, s[b][2 * i]), __fmul_rn(up, s[b][2 * i + 1]));
        if (p.more) sum = make_float2(__fadd_rn(y->x, sum.x), __fadd_rn(y->y, sum.y));
        *y = sum;
      }
    }
  };
  int64_t b = 0;
  for (; b + kRows <= p.batch; b += kRows) measure_from.template operator()<kRows>(b);
  for (; b < p.batch; ++b) measure_from.template operator()<1>(b);
}

// Calls f.operator()<kBits>() with the width as a constant.
template <typename F>
void dispatch_bits(int bits, F&& f) {
  switch (bits) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    default:
      return f.template operator()<4>();
  }
}

}  // namespace

void nested(const NestedParams& p, Stream stream) {
  want_aligned(p.q, 16, "nested", "q");
  want_aligned(p.y, 8, "nested", "y");
  for (int l = 0; l < p.n_levels; ++l) {
    want_aligned(p.level[l].codes, 16, "nested", "codes");
    want_aligned(p.level[l].exponent, 2, "nested", "exponent");
  }
  dispatch(p.dtype, "nested", [&]<typename T>() {
    quantize<T>("nested", {.equal = p.equal, .x = p.x, .q = p.q, .scale = p.scale, .d = p.d},
                p.batch, stream);
  });
  for (int l = 0; l < p.n_levels; ++l) {
    const LevelParams level{.level = p.level[l],
                            .q = p.q,
                            .y = p.y,
                            .batch = p.batch,
                            .d = p.d,
                            .n_neurons = p.n_neurons,
                            .more = l > 0};
    dispatch_bits(p.level[l].bits, [&]<int kBits>() {
      launch("nested", "level", level_kernel<kBits>,
             dim3(blocks_of(p.n_neurons, kMeasureWarps * kMeasureNeurons)),
             dim3(kMeasureWarps * kWarp), stream, level);
    });
  }
}

}  // namespace csfast::cuda
