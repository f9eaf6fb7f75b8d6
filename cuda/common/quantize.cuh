// The activation as the sensors read it: int8 and one scale a row, by the rounding of sense.h.
#pragma once

#include <cstdint>

#include "common/async.cuh"
#include "common/launch.cuh"
#include "common/warp.cuh"
#include "csfast/planes.h"

namespace csfast::cuda {

struct QuantizeParams {
  const float* equal;  // (d)
  const void* x;       // (batch, d), T
  int8_t* q;           // (batch, q_width), written; zero beyond d
  float* scale;        // (batch), written
  int64_t d;
};

inline constexpr int kQuantizeWarps = 16;

// One block a row, which it reads twice; the second time it is in the L1 cache.
template <typename T>
__global__ void __launch_bounds__(kQuantizeWarps* kWarp) quantize_kernel(const QuantizeParams p) {
  __shared__ unsigned warp_peak[kQuantizeWarps];
  const int64_t b = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t width = q_width(p.d);
  const T* x = static_cast<const T*>(p.x) + b * p.d;  // (d)
  int8_t* q = p.q + b * width;                        // (width)
  launch_dependents();
  wait_for_prior();

  // Peak, as bits: those of non-negative floats order as the floats do, and what is not finite
  // lies above all that is.
  unsigned peak_bits = 0;
  for (int64_t c = thread; c < p.d; c += blockDim.x) {
    const float e = __fmul_rn(static_cast<float>(x[c]), p.equal[c]);
    peak_bits = max(peak_bits, __float_as_uint(fabsf(e)));
  }
  peak_bits = __reduce_max_sync(kFull, peak_bits);
  if (thread % kWarp == 0) warp_peak[thread / kWarp] = peak_bits;
  __syncthreads();
  for (const unsigned bits : warp_peak) peak_bits = max(peak_bits, bits);

  const float peak = __uint_as_float(peak_bits);
  const bool finite = peak_bits < 0x7f800000u;  // infinity
  const float inverse = finite && peak > 0.0f ? __fdiv_rn(127.0f, peak) : 0.0f;

  // Round
  for (int64_t c = thread; c < width; c += blockDim.x) {
    float level = 0.0f;
    if (finite && c < p.d) {
      const float e = __fmul_rn(static_cast<float>(x[c]), p.equal[c]);
      level = fminf(fmaxf(rintf(__fmul_rn(e, inverse)), -127.0f), 127.0f);
      if (e == 0.0f) level = 0.0f;  // times the infinite inverse of a tiny peak
    }
    q[c] = static_cast<int8_t>(level);
  }
  if (thread == 0) {
    p.scale[b] = finite ? __fdiv_rn(peak, 127.0f) : __uint_as_float(0x7fc00000u);  // NaN
  }
}

template <typename T>
void quantize(const char* op, const QuantizeParams& p, int64_t batch, Stream stream) {
  launch(op, "quantize", quantize_kernel<T>, dim3(static_cast<unsigned>(batch)),
         dim3(kQuantizeWarps * kWarp), stream, p);
}

}  // namespace csfast::cuda
