// Project on CUDA: one warp per measurement, which walks over the batch.
//
// Reads phi once for four rows of the batch, which bounds it; x stays in the L1 cache. Addresses
// off a multiple of 16 bytes go by single elements, in the same order of summation.
#include "common/dispatch.cuh"
#include "common/launch.cuh"
#include "common/vector.cuh"
#include "common/warp.cuh"
#include "csfast/project.h"

namespace csfast::cuda {
namespace {

constexpr int kProjectWarps = 4;  // a block: small ones, so that few measurements have many SMs
constexpr int kBatch = 4;         // rows of the batch at once
constexpr int kUnroll = 4;        // loads of 16 bytes of phi that a lane has in flight

// The first n elements at `from`, zeros beyond; nothing beyond them is read. If kAligned, `from` is
// a multiple of 16 bytes and n one of a vector.
template <typename T, bool kAligned>
__device__ __forceinline__ Vector<T> load_part(const T* from, int64_t n) {
  if constexpr (kAligned) {
    if (n > 0) return load_vector(from);
  }
  Vector<T> v;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    v.at[i] = !kAligned && i < n ? from[i] : static_cast<T>(0.0f);
  return v;
}

// y[b] of kRows activations and one row of phi: in every lane.
template <typename T, bool kAligned, int kRows>
__device__ __forceinline__ void dot_rows(const T* phi, const T* x, int64_t d, float (&y)[kRows]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float sum[kRows] = {};
  for (int64_t c0 = lane * kVector<T>; c0 < d; c0 += kUnroll * kStrip<T>) {
    Vector<T> w[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int64_t c = c0 + k * kStrip<T>;
      w[k] = load_part<T, kAligned>(phi + c, d - c);
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int64_t c = c0 + k * kStrip<T>;
#pragma unroll
      for (int b = 0; b < kRows; ++b) {
        const Vector<T> v = load_part<T, kAligned>(x + b * d + c, d - c);
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) {
          sum[b] = fmaf(static_cast<float>(w[k].at[i]), static_cast<float>(v.at[i]), sum[b]);
        }
      }
    }
  }
#pragma unroll
  for (int b = 0; b < kRows; ++b) y[b] = warp_sum(sum[b]);
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kProjectWarps* kWarp) project_kernel(const ProjectParams p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t i = int64_t{blockIdx.x} * kProjectWarps + threadIdx.x / kWarp;
  if (i >= p.rows) return;                                // the whole warp
  const T* phi = static_cast<const T*>(p.phi) + i * p.d;  // (d)
  const T* x = static_cast<const T*>(p.x);                // (batch, d)

  const auto project_from = [&]<int kRows>(int64_t b0) {
    float y[kRows];
    dot_rows<T, kAligned>(phi, x + b0 * p.d, p.d, y);
    if (lane != 0) return;
#pragma unroll
    for (int b = 0; b < kRows; ++b) p.y[(b0 + b) * p.rows + i] = y[b];
  };
  int64_t b = 0;
  for (; b + kBatch <= p.batch; b += kBatch) project_from.template operator()<kBatch>(b);
  for (; b < p.batch; ++b) project_from.template operator()<1>(b);
}

}  // namespace

void project(const ProjectParams& p, Stream stream) {
  dispatch(p.dtype, "project", [&]<typename T>() {
    const bool aligned = p.d % kVector<T> == 0 && is_aligned(p.phi) && is_aligned(p.x);
    launch("project", "project", aligned ? project_kernel<T, true> : project_kernel<T, false>,
           dim3(blocks_of(p.rows, kProjectWarps)), dim3(kProjectWarps * kWarp), stream, p);
  });
}

}  // namespace csfast::cuda
