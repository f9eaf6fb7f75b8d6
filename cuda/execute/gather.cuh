// What one block makes of the neurons that it is given: their activations, and the sum of their
// down rows times these. The one loop of execute that reads weights for a single row of the batch.
//
// The threads of a group share a neuron, each with the same columns of its three rows, so that the
// sum of a column never leaves its thread. Down rows do not wait for activations: all three rows of
// the neurons ahead are on their way while the dot products of those at hand are added up, which
// takes one barrier for kAtOnce neurons of every group. Rows come straight to registers, or in bulk
// into a ring in shared memory. Both give the same bits: a dot product is added up in a tree that
// depends on the threads of a group only, and neurons follow each other in the order of the list.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/activate.cuh"
#include "common/async.cuh"
#include "common/warp.cuh"
#include "csfast/types.h"
#include "execute/sizes.h"

namespace csfast::cuda {

struct Gather {
  const char* gate;        // (n_neurons, row_bytes)
  const char* up;          // (n_neurons, row_bytes)
  const char* down_t;      // (n_neurons, row_bytes)
  const void* gate_bias;   // (n_neurons), T, or null
  const void* up_bias;     // (n_neurons), T, or null
  const int32_t* neurons;  // (count), in shared memory; -1 for none
  int count;
  int row_bytes;      // a multiple of 16
  int group_threads;  // a power of two, whole warps
  Activation activation;
};

// Padded by four, so that the lanes that read it find their words in different banks.
template <int kAtOnce>
struct GatherShared {
  float dot[2][2 * kAtOnce][kGatherWarps + 4];  // in turns; by dot product and warp
};

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t two);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t two) {
  return make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t two) {
  return make_float2(__half2float(__ushort_as_half(static_cast<uint16_t>(two))),
                     __half2float(__ushort_as_half(static_cast<uint16_t>(two >> 16))));
}

template <typename T>
__device__ __forceinline__ void unpack_all(const uint4& v, float (&to)[kLaneColumns]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float2 two = unpack<T>(words[k]);
    to[2 * k] = two.x;
    to[2 * k + 1] = two.y;
  }
}

template <typename T>
__device__ __forceinline__ float dot(const uint4& row, const float (&x)[kLaneColumns], float sum) {
  float w[kLaneColumns];
  unpack_all<T>(row, w);
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) sum = fmaf(w[i], x[i], sum);
  return sum;
}

template <typename T>
__device__ __forceinline__ void add_row(const uint4& row, float a, float (&sum)[kLaneColumns]) {
  float w[kLaneColumns];
  unpack_all<T>(row, w);
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) sum[i] = fmaf(a, w[i], sum[i]);
}

// Sums kValues numbers over the lanes at once: lane l gets that of number l / (kWarp / kValues).
// Each in the order of warp_sum().
template <int kValues>
__device__ __forceinline__ float warp_sums(float (&v)[kValues]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int offset = kWarp / 2;
#pragma unroll
  for (int n = kValues / 2; n > 0; n /= 2) {
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float mine = upper ? v[i + n] : v[i];
      const float others = upper ? v[i] : v[i + n];
      v[i] = mine + __shfl_xor_sync(kFull, others, offset);
    }
    offset /= 2;
  }
#pragma unroll
  for (; offset > 0; offset /= 2) v[0] += __shfl_xor_sync(kFull, v[0], offset);
  return v[0];
}

// Who a thread is, among those of its block that share neurons.
struct Place {
  int group;   // of the block's
  int groups;  // of the block
  int thread;  // of the group's
  int warps;   // of a group

  __device__ __forceinline__ explicit Place(int group_threads)
      : group(static_cast<int>(threadIdx.x) / group_threads),
        groups(kGatherThreads / group_threads),
        thread(static_cast<int>(threadIdx.x) % group_threads),
        warps(group_threads / kWarp) {}

  // Of the list: neuron i of step s of the group. Neighbours in the list go to different groups, so
  // that a short list has something for each.
  template <int kAtOnce>
  __device__ __forceinline__ int position(int s, int i) const {
    return (s * kAtOnce + i) * groups + group;
  }
};

__device__ __forceinline__ int neuron_at(const Gather& g, int position) {
  return position < g.count ? g.neurons[position] : -1;
}

// The bias that the calling lane adds to the dot product that it ends up with, in finish_dots().
template <typename T, int kAtOnce>
__device__ __forceinline__ float lane_bias(const Gather& g, const Place& place, int s) {
  if (g.gate_bias == nullptr && g.up_bias == nullptr) return 0.0f;
  const int value = static_cast<int>(threadIdx.x) % kWarp / (kWarp / (2 * kAtOnce));
  const int j = neuron_at(g, place.position<kAtOnce>(s, value / 2));
  const void* bias = value % 2 == 0 ? g.gate_bias : g.up_bias;
  return j < 0 || bias == nullptr ? 0.0f : static_cast<float>(static_cast<const T*>(bias)[j]);
}

// From the lanes' shares of the gate and up products of kAtOnce neurons, v[2 i] and v[2 i + 1], to
// their activations, in every thread of the group. One barrier.
template <int kAtOnce>
__device__ __forceinline__ void finish_dots(GatherShared<kAtOnce>& shared, const Gather& g,
                                            const Place& place, int s, float bias,
                                            float (&v)[2 * kAtOnce], float (&a)[kAtOnce]) {
  constexpr int kSpan = kWarp / (2 * kAtOnce);  // lanes that have one product
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int value = lane / kSpan;
  const float share = warp_sums(v);
  if (lane % kSpan == 0) shared.dot[s % 2][value][warp] = share;
  // Orders the shares; and whatever threads read in step s - 1 before what is written in step s +
  // 1, or copied into its place in the ring from here on.
  __syncthreads();

  // Warps w and w + 8, then 4, 2 and 1 apart, whatever kAtOnce is.
  float part[kGatherWarps / kSpan];
#pragma unroll
  for (int k = 0; k < kGatherWarps / kSpan; ++k) {
    const int w = lane % kSpan + k * kSpan;
    part[k] = w < place.warps ? shared.dot[s % 2][value][place.group * place.warps + w] : 0.0f;
  }
#pragma unroll
  for (int n = kGatherWarps / kSpan / 2; n > 0; n /= 2) {
#pragma unroll
    for (int k = 0; k < n; ++k) part[k] += part[k + n];
  }
  float z = part[0];
#pragma unroll
  for (int offset = kSpan / 2; offset > 0; offset /= 2) {
    z += __shfl_xor_sync(kFull, z, offset);
  }
  z += bias;
  const float other = __shfl_xor_sync(kFull, z, kSpan);
  const float gate = value % 2 == 0 ? z : other;
  const float up = value % 2 == 0 ? other : z;
  const bool is_there = neuron_at(g, place.position<kAtOnce>(s, value / 2)) >= 0;
  const float activation = is_there ? activate(g.activation, gate) * up : 0.0f;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) a[i] = __shfl_sync(kFull, activation, 2 * i * kSpan);
}

// What a thread has of x, packed as it lies in memory: a single load in a register, more in its own
// part of shared memory, for want of registers.
template <int kVectors>
struct OwnX {
  struct Shared {
    uint4 at[kVectors][kGatherThreads];
  };
  Shared& shared;

  __device__ __forceinline__ void set(int k, const uint4& v) { shared.at[k][threadIdx.x] = v; }
  __device__ __forceinline__ uint4 get(int k) const { return shared.at[k][threadIdx.x]; }
};
template <>
struct OwnX<1> {
  struct Shared {};
  Shared& shared;
  uint4 at;

  __device__ __forceinline__ void set(int, const uint4& v) { at = v; }
  __device__ __forceinline__ uint4 get(int) const { return at; }
};

// Adds to sum, the thread's columns, what the neurons contribute.
template <typename T, int kVectors>
__device__ __forceinline__ void gather_register(const Gather& g, const Place& place,
                                                GatherShared<kRegisterNeurons<kVectors>>& shared,
                                                const OwnX<kVectors>& x,
                                                float (&sum)[kVectors][kLaneColumns]) {
  constexpr int kAtOnce = kRegisterNeurons<kVectors>;
  const uint64_t policy = read_once();
  const int steps = (g.count + place.groups * kAtOnce - 1) / (place.groups * kAtOnce);
  uint4 gates[kAtOnce][kVectors];
  uint4 ups[kAtOnce][kVectors];
  uint4 downs[kAtOnce][kVectors];
  // Zeros where there is no neuron or column.
  const auto load = [&](const char* rows, int s, uint4(&to)[kAtOnce][kVectors]) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int j = neuron_at(g, place.position<kAtOnce>(s, i));
      const char* row = rows + int64_t{j} * g.row_bytes;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int at = 16 * (v * g.group_threads + place.thread);
        to[i][v] = make_uint4(0, 0, 0, 0);
        if (j >= 0 && at < g.row_bytes) to[i][v] = load_once(row + at, policy);
      }
    }
  };
  if (steps > 0) {
    load(g.gate, 0, gates);
    load(g.up, 0, ups);
    load(g.down_t, 0, downs);
  }
  for (int s = 0; s < steps; ++s) {
    const float bias = lane_bias<T, kAtOnce>(g, place, s);
    float v[2 * kAtOnce] = {};
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float xs[kLaneColumns];
      unpack_all<T>(x.get(k), xs);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        v[2 * i] = dot<T>(gates[i][k], xs, v[2 * i]);
        v[2 * i + 1] = dot<T>(ups[i][k], xs, v[2 * i + 1]);
      }
    }
    if (s + 1 < steps) {
      load(g.gate, s + 1, gates);
      load(g.up, s + 1, ups);
    }
    float a[kAtOnce];
    finish_dots<kAtOnce>(shared, g, place, s, bias, v, a);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) add_row<T>(downs[i][k], a[i], sum[k]);
    }
    if (s + 1 < steps) load(g.down_t, s + 1, downs);
  }
}

// The same through the ring, kRingBytes at a multiple of 128 bytes. Rows that are not there are
// neither copied nor read. `arrival`: one a slot, initialised, used by nobody since.
template <typename T, int kVectors>
__device__ __forceinline__ void gather_bulk(const Gather& g, const Place& place,
                                            GatherShared<kBulkNeurons<kVectors>>& shared,
                                            Arrival* arrival, char* ring, const OwnX<kVectors>& x,
                                            float (&sum)[kVectors][kLaneColumns]) {
  constexpr int kAtOnce = kBulkNeurons<kVectors>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const bool copies = threadIdx.x < kWarp;
  const int step_neurons = place.groups * kAtOnce;
  const int steps = (g.count + step_neurons - 1) / step_neurons;
  const uint64_t policy = read_once();
  const auto row_of = [&](int s, int i, int matrix) {  // neuron i of step s, of all groups
    return ring + (s % kSlots) * kSlotBytes<kVectors> + (3 * i + matrix) * g.row_bytes;
  };
  const auto copy_step = [&](int s) {  // by the first warp
    Arrival* done = arrival + s % kSlots;
    const int first = s * step_neurons;
    int there = 0;
    for (int i0 = 0; i0 < step_neurons; i0 += kWarp) {
      const int i = i0 + lane;
      const bool is_there = i < step_neurons && neuron_at(g, first + i) >= 0;
      there += __popc(__ballot_sync(kFull, is_there));
    }
    if (lane == 0) expect(done, there * 3 * g.row_bytes);
    __syncwarp();  // announced before any of it comes
    for (int i = lane; i < 3 * step_neurons; i += kWarp) {
      const int j = neuron_at(g, first + i / 3);
      const char* rows = i % 3 == 0 ? g.gate : i % 3 == 1 ? g.up : g.down_t;
      if (j < 0) continue;
      copy_bulk(row_of(s, i / 3, i % 3), rows + int64_t{j} * g.row_bytes, g.row_bytes, done,
                policy);
    }
    __syncwarp();
  };
  if (copies) {
    for (int s = 0; s < min(steps, kSlots); ++s) copy_step(s);
  }
  for (int s = 0; s < steps; ++s) {
    const float bias = lane_bias<T, kAtOnce>(g, place, s);
    bool is_there[kAtOnce];
    float v[2 * kAtOnce] = {};
    wait(arrival + s % kSlots, s / kSlots % 2);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int of_step = i * place.groups + place.group;
      is_there[i] = neuron_at(g, s * step_neurons + of_step) >= 0;
      if (!is_there[i]) continue;
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const int at = 16 * (k * g.group_threads + place.thread);
        if (at >= g.row_bytes) continue;
        float xs[kLaneColumns];
        unpack_all<T>(x.get(k), xs);
        const char* rows = row_of(s, of_step, 0) + at;
        v[2 * i] = dot<T>(*reinterpret_cast<const uint4*>(rows), xs, v[2 * i]);
        v[2 * i + 1] =
            dot<T>(*reinterpret_cast<const uint4*>(rows + g.row_bytes), xs, v[2 * i + 1]);
      }
    }
    float a[kAtOnce];
    finish_dots<kAtOnce>(shared, g, place, s, bias, v, a);
    // Everyone is past step s - 1, so its slot may be filled again.
    if (copies && s > 0 && s - 1 + kSlots < steps) copy_step(s - 1 + kSlots);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (!is_there[i]) continue;
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const int at = 16 * (k * g.group_threads + place.thread);
        if (at >= g.row_bytes) continue;
        const char* row = row_of(s, i * place.groups + place.group, 2) + at;
        add_row<T>(*reinterpret_cast<const uint4*>(row), a[i], sum[k]);
      }
    }
  }
}

// Writes the sums of the block's groups, added in their order, to partial (row_bytes / 2). `all` is
// kSumBytes of shared memory that nobody uses any more, if there are several groups.
template <int kVectors>
__device__ __forceinline__ void write_partial(const Gather& g, const Place& place,
                                              const float (&sum)[kVectors][kLaneColumns],
                                              float* all, float* partial) {
  const int width = g.row_bytes / 2;
  float* to = partial;
  if constexpr (kVectors == 1) {
    if (place.groups > 1) {
      __syncthreads();  // everyone has done with what is there
      to = all + place.group * width;
    }
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = kLaneColumns * (v * g.group_threads + place.thread);
    if (column >= width) continue;
    float4* four = reinterpret_cast<float4*>(to + column);
    four[0] = make_float4(sum[v][0], sum[v][1], sum[v][2], sum[v][3]);
    four[1] = make_float4(sum[v][4], sum[v][5], sum[v][6], sum[v][7]);
  }
  if constexpr (kVectors == 1) {
    if (place.groups == 1) return;
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.x); c < width; c += kGatherThreads) {
      float total = all[c];
      for (int i = 1; i < place.groups; ++i) total += all[i * width + c];
      partial[c] = total;
    }
  }
}

// The thread's columns of x, packed; zeros beyond the row.
template <int kVectors>
__device__ __forceinline__ void load_x(const Gather& g, const Place& place, const void* x,
                                       OwnX<kVectors>& to) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = 16 * (v * g.group_threads + place.thread);
    uint4 own = make_uint4(0, 0, 0, 0);
    if (at < g.row_bytes) {
      own = *reinterpret_cast<const uint4*>(static_cast<const char*>(x) + at);
    }
    to.set(v, own);
  }
}

}  // namespace csfast::cuda
