// Read on CUDA: blocks take chunks of all buffers in turns, a thread eight loads of 16 bytes at
// once.
#include <cuda_runtime.h>

#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/warp.cuh"
#include "csfast/read.h"

namespace csfast::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kLoads = 8;                      // of 16 bytes that a thread has in flight
constexpr int64_t kChunk = kThreads * kLoads;  // vectors that a block takes at a time: 64 KB
constexpr int kVectorBytes = sizeof(uint4);

struct KernelParams {
  const uint4* data[kMaxSpans];  // (vectors of the span)
  uint32_t vectors[kMaxSpans];
  uint32_t chunks_to[kMaxSpans];  // chunks of this span and all before it
  int n_spans;
  uint32_t* sum;  // (blocks)
};
static_assert(sizeof(KernelParams) <= 4096, "more than every architecture takes of arguments");

__global__ void __launch_bounds__(kThreads) read_kernel(const KernelParams p) {
  const int thread = static_cast<int>(threadIdx.x);
  uint32_t sum = 0;
  int span = 0;
  for (int64_t chunk = blockIdx.x; chunk < p.chunks_to[p.n_spans - 1]; chunk += gridDim.x) {
    while (chunk >= p.chunks_to[span]) ++span;
    const uint32_t before = span == 0 ? 0 : p.chunks_to[span - 1];
    const int64_t first = (chunk - before) * kChunk + thread;
    const int64_t left = p.vectors[span] - first;
    const uint4* data = p.data[span] + first;
    uint4 vector[kLoads];
    if (left > (kLoads - 1) * kThreads) {  // all, with nothing asked between them
#pragma unroll
      for (int k = 0; k < kLoads; ++k) vector[k] = __ldcs(data + k * kThreads);
    } else {
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        vector[k] = k * kThreads < left ? __ldcs(data + k * kThreads) : uint4{0, 0, 0, 0};
      }
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      sum += vector[k].x + vector[k].y + vector[k].z + vector[k].w;
    }
  }
  __shared__ uint32_t of_warp[kThreads / kWarp];
  sum = __reduce_add_sync(kFull, sum);
  if (thread % kWarp == 0) of_warp[thread / kWarp] = sum;
  __syncthreads();
  if (thread > 0) return;
  uint32_t total = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += of_warp[warp];
  p.sum[blockIdx.x] = total;
}

}  // namespace

// As many blocks as are at work at once.
int64_t read_sums() {
  int of_processor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_processor, read_kernel, kThreads, 0),
        "read", "read", "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return int64_t{of_processor} * chip("read").n_processors;
}

void read(const ReadParams& p, Stream stream) {
  KernelParams k{};
  k.n_spans = p.n_spans;
  k.sum = p.sum;
  uint32_t chunks = 0;
  for (int i = 0; i < p.n_spans; ++i) {
    k.data[i] = static_cast<const uint4*>(p.span[i].data);
    const int64_t vectors = p.span[i].bytes / kVectorBytes;
    k.vectors[i] = static_cast<uint32_t>(vectors);
    chunks += blocks_of(vectors, kChunk);
    k.chunks_to[i] = chunks;
  }
  launch("read", "read", read_kernel, dim3(static_cast<unsigned>(read_sums())), dim3(kThreads),
         stream, k);
}

}  // namespace csfast::cuda
