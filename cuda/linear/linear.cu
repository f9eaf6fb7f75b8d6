// Linear on CUDA: one warp per row of w, which walks over the batch.
//
// Plain: single elements, so that no address is odd. Reads w once for eight rows of the batch,
// which bounds it; x stays in the caches.
#include <cuda_bf16.h>

#include "common/launch.cuh"
#include "common/warp.cuh"
#include "csfast/linear.h"

namespace csfast::cuda {
namespace {

constexpr int kLinearWarps = 4;  // a block
constexpr int kRowsAtOnce = 8;   // of the batch

template <typename T, int kRows>
__device__ __forceinline__ void multiply_rows(const LinearParams& p, int64_t r, int64_t b0) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const T* w = static_cast<const T*>(p.w) + r * p.cols;  // (cols)
  const float* x = p.x + b0 * p.cols;                    // (kRows, cols)
  float sum[kRows] = {};
#pragma unroll 4
  for (int64_t c = lane; c < p.cols; c += kWarp) {
    const float weight = static_cast<float>(w[c]);
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      sum[b] = fmaf(weight, static_cast<float>(static_cast<T>(x[b * p.cols + c])), sum[b]);
    }
  }
#pragma unroll
  for (int b = 0; b < kRows; ++b) {
    sum[b] = warp_sum(sum[b]);
  }
  if (lane != 0) return;
#pragma unroll
  for (int b = 0; b < kRows; ++b) {
    p.y[(b0 + b) * p.rows + r] =
        p.bias == nullptr ? sum[b] : sum[b] + static_cast<float>(static_cast<const T*>(p.bias)[r]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kLinearWarps* kWarp) linear_kernel(const LinearParams p) {
  const int64_t r = int64_t{blockIdx.x} * kLinearWarps + threadIdx.x / kWarp;
  if (r >= p.rows) return;  // the whole warp
  int64_t b = 0;
  for (; b + kRowsAtOnce <= p.batch; b += kRowsAtOnce) multiply_rows<T, kRowsAtOnce>(p, r, b);
  for (; b < p.batch; ++b) multiply_rows<T, 1>(p, r, b);
}

}  // namespace

void linear(const LinearParams& p, Stream stream) {
  launch("linear", "linear",
         p.dtype == DType::kF32 ? linear_kernel<float> : linear_kernel<__nv_bfloat16>,
         dim3(blocks_of(p.rows, kLinearWarps)), dim3(kLinearWarps * kWarp), stream, p);
}

}  // namespace csfast::cuda
