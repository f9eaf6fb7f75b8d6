// The activation as the sensors read it: int8 and one scale a row, by the rounding of sense.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
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

struct Eight {
  float at[8];
};

// Eight elements at an address that is a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ Eight load_eight(const T* from) {
  const uint4* words = reinterpret_cast<const uint4*>(from);
  Eight v;
  if constexpr (sizeof(T) == 4) {
    const uint4 low = words[0];
    const uint4 high = words[1];
    const uint32_t bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) v.at[i] = __uint_as_float(bits[i]);
  } else {
    struct alignas(16) Halves {
      T at[8];
    };
    const Halves halves = std::bit_cast<Halves>(words[0]);
#pragma unroll
    for (int i = 0; i < 8; ++i) v.at[i] = static_cast<float>(halves.at[i]);
  }
  return v;
}

// Peaks as bits: those of non-negative floats order as the floats do, and what is not finite lies
// above all that is.
inline constexpr unsigned kInfinity = 0x7f800000u;

// What channels are multiplied by, and what stands for 1 of their levels.
__device__ __forceinline__ float inverse_of(unsigned peak_bits) {
  const float peak = __uint_as_float(peak_bits);
  return peak_bits < kInfinity && peak > 0.0f ? __fdiv_rn(127.0f, peak) : 0.0f;
}
__device__ __forceinline__ float scale_of(unsigned peak_bits) {
  const bool finite = peak_bits < kInfinity;
  return finite ? __fdiv_rn(__uint_as_float(peak_bits), 127.0f) : __uint_as_float(0x7fc00000u);
}

// Eight levels, a byte each; all zero if the peak is not finite.
__device__ __forceinline__ uint2 round_eight(const Eight& equalised, unsigned peak_bits,
                                             float inverse) {
  uint32_t words[2] = {};
  if (peak_bits < kInfinity) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float e = equalised.at[i];
      float level = fminf(fmaxf(__fmul_rn(e, inverse), -127.0f), 127.0f);
      if (e == 0.0f) level = 0.0f;  // times the infinite inverse of a tiny peak
      // 1.5 * 2^23: the sum has no room for fractions, and rounds half to even.
      const uint32_t bits = __float_as_uint(__fadd_rn(level, 12582912.0f));
      words[i / 4] |= (bits & 0xffu) << (8 * (i % 4));
    }
  }
  return make_uint2(words[0], words[1]);
}

// The product with the equaliser, channel by channel.
template <typename T>
__device__ __forceinline__ Eight equalised(const T* x, const float* equal) {
  Eight v = load_eight(x);
  const Eight factor = load_eight(equal);
#pragma unroll
  for (int i = 0; i < 8; ++i) v.at[i] = __fmul_rn(v.at[i], factor.at[i]);
  return v;
}

__device__ __forceinline__ unsigned peak_of(const Eight& v, unsigned peak) {
#pragma unroll
  for (int i = 0; i < 8; ++i) peak = max(peak, __float_as_uint(fabsf(v.at[i])));
  return peak;
}

inline constexpr int kHeld = 2;  // times eight channels that a thread has in registers

// A thread's part of a row: eight channels from `first` on, and from every step-th beyond it, of
// `width` at addresses that are multiples of 16 bytes; zeros from there to `channels`. Gives the
// row's peak, which reduce(peak of the part) finds out; write(c, levels) takes eight levels. The
// row is read once if registers hold it; meanwhile() is called when the first of it is on its way.
template <typename T, typename Meanwhile, typename Reduce, typename Write>
__device__ __forceinline__ unsigned quantize_part(const T* x, const float* equal, int width,
                                                  int channels, int first, int step,
                                                  Meanwhile meanwhile, Reduce reduce, Write write) {
  // Peak
  Eight held[kHeld] = {};
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int c = first + k * step;
    if (c < width) held[k] = equalised(x + c, equal + c);
  }
  meanwhile();
  unsigned peak = 0;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) peak = peak_of(held[k], peak);
#pragma unroll 1
  for (int c = first + kHeld * step; c < width; c += step) {
    peak = peak_of(equalised(x + c, equal + c), peak);
  }
  peak = reduce(peak);

  // Round
  const float inverse = inverse_of(peak);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int c = first + k * step;
    if (c < channels) write(c, round_eight(held[k], peak, inverse));
  }
#pragma unroll 1
  for (int c = first + kHeld * step; c < channels; c += step) {
    Eight v{};
    if (c < width) v = equalised(x + c, equal + c);
    write(c, round_eight(v, peak, inverse));
  }
  return peak;
}

inline constexpr int kQuantizeWarps = 16;

// The greatest of what the threads of the block have.
__device__ __forceinline__ unsigned block_peak(unsigned peak,
                                               unsigned (&warp_peak)[kQuantizeWarps]) {
  const auto thread = static_cast<int>(threadIdx.x);
  peak = __reduce_max_sync(kFull, peak);
  if (thread % kWarp == 0) warp_peak[thread / kWarp] = peak;
  __syncthreads();
  return __reduce_max_sync(kFull, warp_peak[thread % kQuantizeWarps]);
}

// One block a row, which it reads twice, unless registers hold it; the second time it is in the L1
// cache. kWide: eight channels at a time, rows and `equal` at multiples of 16 bytes.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kQuantizeWarps* kWarp) quantize_kernel(const QuantizeParams p) {
  __shared__ unsigned warp_peak[kQuantizeWarps];
  const int64_t b = blockIdx.x;
  const auto thread = static_cast<int>(threadIdx.x);
  const int64_t width = q_width(p.d);
  const T* x = static_cast<const T*>(p.x) + b * p.d;  // (d)
  int8_t* q = p.q + b * width;                        // (width)
  launch_dependents();
  wait_for_prior();

  unsigned peak = 0;
  if constexpr (kWide) {
    peak = quantize_part(
        x, p.equal, static_cast<int>(p.d), static_cast<int>(width), 8 * thread,
        8 * kQuantizeWarps * kWarp, [] {},
        [&](unsigned of_part) { return block_peak(of_part, warp_peak); },
        [&](int c, const uint2& levels) { *reinterpret_cast<uint2*>(q + c) = levels; });
  } else {
    for (int64_t c = thread; c < p.d; c += blockDim.x) {
      const float e = __fmul_rn(static_cast<float>(x[c]), p.equal[c]);
      peak = max(peak, __float_as_uint(fabsf(e)));
    }
    peak = block_peak(peak, warp_peak);
    const float inverse = inverse_of(peak);
    for (int64_t c = thread; c < width; c += blockDim.x) {
      float level = 0.0f;
      if (peak < kInfinity && c < p.d) {
        const float e = __fmul_rn(static_cast<float>(x[c]), p.equal[c]);
        level = fminf(fmaxf(rintf(__fmul_rn(e, inverse)), -127.0f), 127.0f);
        if (e == 0.0f) level = 0.0f;  // times the infinite inverse of a tiny peak
      }
      q[c] = static_cast<int8_t>(level);
    }
  }
  if (thread == 0) p.scale[b] = scale_of(peak);
}

// May begin before the kernel before has ended, if it `overlaps`.
template <typename T>
void quantize(const char* op, const QuantizeParams& p, int64_t batch, const Queue& queue,
              bool overlaps = false) {
  const bool is_wide = p.d % 8 == 0 && is_aligned(p.x) && is_aligned(p.equal) && is_aligned(p.q);
  launch(op, "quantize", is_wide ? quantize_kernel<T, true> : quantize_kernel<T, false>,
         dim3(static_cast<unsigned>(batch)), dim3(kQuantizeWarps * kWarp), queue, p,
         {.overlaps = overlaps, .x = &p.x});
}

}  // namespace csfast::cuda
