// Recover on CUDA: one block per list, that is per row of the batch or for all rows together.
//
// Reads 16 bytes a neuron and row and writes 8; what bounds it is the latency of one block going
// over its neurons a few times: usages, for top-k four rounds of counting, then compaction.
#include "common/compact.cuh"
#include "common/launch.cuh"
#include "common/usage.cuh"
#include "csfast/recover.h"

namespace csfast::cuda {
namespace {

constexpr int kThreads = kCompactWarps * kWarp;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kLaneDigits = kDigits / kWarp;  // counts that one lane adds up

struct Shared {
  CompactShared compact;
  int count[kDigits];
  unsigned prefix;  // leading digits of the key where the budget ends
  int left;         // budget not yet spent on keys above the prefix
};

// Orders as the usages do, which are not negative; not-a-number ranks with infinity.
__device__ __forceinline__ unsigned key_of(float usage) {
  return isnan(usage) ? 0x7f800000u : __float_as_uint(usage);
}

// Lowers shared.prefix by one digit: the largest at which the counts from the top reach the budget
// that is left. One warp; each lane has kLaneDigits neighbouring digits, lane 0 the largest.
__device__ __forceinline__ void take_digit(Shared& shared, int shift) {
  const int lane = static_cast<int>(threadIdx.x);
  const int top = kDigits - 1 - lane * kLaneDigits;
  int own = 0;
#pragma unroll
  for (int i = 0; i < kLaneDigits; ++i) own += shared.count[top - i];
  int through = own;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int other = __shfl_up_sync(kFull, through, offset);
    if (lane >= offset) through += other;
  }
  const int left = shared.left;
  int above = through - own;
  __syncwarp();  // every lane has read `left`
  if (above >= left || through < left) return;
#pragma unroll
  for (int i = 0; i < kLaneDigits; ++i) {
    const int next = above + shared.count[top - i];
    if (above < left && next >= left) {
      shared.prefix |= static_cast<unsigned>(top - i) << shift;
      shared.left = left - above;
    }
    above = next;
  }
}

// Finds the key of the last neuron that the budget, at least 1 and at most n, affords: in
// shared.prefix, and in shared.left how many neurons of just that key it affords.
__device__ __forceinline__ void find_last_key(Shared& shared, const float* usage, int64_t n,
                                              int budget) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    shared.prefix = 0;
    shared.left = budget;
  }
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    if (thread < kDigits) shared.count[thread] = 0;
    __syncthreads();
    const unsigned prefix = shared.prefix;
    for (int64_t j = thread; j < n; j += kThreads) {
      const unsigned key = key_of(usage[j]);
      // Two shifts: one by all 32 bits would be undefined.
      const bool same = ((key ^ prefix) >> shift) >> kDigitBits == 0;
      if (same) atomicAdd(&shared.count[key >> shift & (kDigits - 1)], 1);
    }
    __syncthreads();
    if (thread < kWarp) take_digit(shared, shift);
    __syncthreads();  // orders prefix and left, and the counts before they are cleared
  }
}

// What a neuron has of an array, read at once.
template <typename E, int kColumns>
struct alignas(sizeof(E) * kColumns) Columns {
  E at[kColumns];
};

// The usage of neuron j in row b, from measurements Y of kColumns columns.
template <typename Y, int kColumns>
__device__ __forceinline__ float neuron_usage(const RecoverParams& p, const Columns<Y, kColumns>* y,
                                              int64_t b, int64_t j) {
  const auto measured = y[b * p.n_neurons + j];
  const auto row_scale = reinterpret_cast<const Columns<float, kColumns>*>(p.row_scale)[j];
  float v[kColumns];
#pragma unroll
  for (int r = 0; r < kColumns; ++r) {
    v[r] = scaled(p.scale[b], row_scale.at[r], static_cast<float>(measured.at[r]), p.offset,
                  j * kColumns + r);
  }
  if constexpr (kColumns == 1) return fabsf(v[0]);
  return usage_of(p.activation, v[0], v[kColumns - 1]);
}

template <typename Y, int kColumns>
__global__ void __launch_bounds__(kThreads, 1) recover_kernel(const RecoverParams p) {
  __shared__ Shared shared;
  const int64_t list = blockIdx.x;
  const int64_t n = n_groups(p.n_neurons, p.group_rows);
  const void* measured = p.y != nullptr ? static_cast<const void*>(p.y) : p.y_float;
  const auto* y = static_cast<const Columns<Y, kColumns>*>(measured);  // (batch, n_neurons)
  float* usage = p.usage + list * n;                                   // (n)
  int32_t* index = p.index + list * n;                                 // (n)
  const Votes votes = votes_of(p.weight, p.scale, p.batch, list);

  // Usage
  for (int64_t group = threadIdx.x; group < n; group += kThreads) {
    const auto of_row = [&](int64_t b) {
      return group_usage(group, p.n_neurons, p.group_rows,
                         [&](int64_t j) { return neuron_usage<Y, kColumns>(p, y, b, j); });
    };
    usage[group] = p.weight == nullptr ? of_row(list) : joint_usage(p.weight, p.batch, of_row);
  }
  __syncthreads();

  float missed = 0.0f;
  const auto emit = [&](int64_t j, int rank) {
    if (rank >= 0) {
      index[rank] = static_cast<int32_t>(j);
    } else {
      missed = __fmaf_rn(usage[j], usage[j], missed);
    }
  };
  int count = 0;
  if (p.rule == Rule::kThreshold) {
    const float threshold = p.threshold[list];
    const auto choose = [&](int64_t j) {
      return is_kept(usage[j], threshold, votes) ? Choice::kKeep : Choice::kDrop;
    };
    count = compact(shared.compact, n, 0, choose, emit);
  } else {
    const int64_t budget = min(max(int64_t{p.budget[list]}, int64_t{0}), n);
    const bool everything = !votes.none && (votes.all || budget == n);
    const bool nothing = votes.none || (budget == 0 && !everything);
    if (!everything && !nothing) {
      find_last_key(shared, usage, n, static_cast<int>(budget));
    }
    const unsigned last = shared.prefix;
    const int ties = everything || nothing ? 0 : shared.left;
    const auto choose = [&](int64_t j) {
      if (everything || nothing) return everything ? Choice::kKeep : Choice::kDrop;
      const unsigned key = key_of(usage[j]);
      return key > last ? Choice::kKeep : key == last ? Choice::kTie : Choice::kDrop;
    };
    count = compact(shared.compact, n, ties, choose, emit);
  }

  missed = block_sum(shared.compact, missed);
  if (threadIdx.x == 0) {
    p.count[list] = count;
    p.missed[list] = missed;
  }
}

template <typename Y, int kColumns>
void launch_lists(const RecoverParams& p, Stream stream) {
  const auto lists = static_cast<unsigned>(p.weight == nullptr ? p.batch : 1);
  launch("recover", "recover", recover_kernel<Y, kColumns>, dim3(lists), dim3(kThreads), stream, p);
}

}  // namespace

void recover(const RecoverParams& p, Stream stream) {
  want_aligned(p.y != nullptr ? static_cast<const void*>(p.y) : p.y_float, 4 * p.columns, "recover",
               "y");
  want_aligned(p.row_scale, 4 * p.columns, "recover", "row_scale");
  if (p.y == nullptr) {
    p.columns == 1 ? launch_lists<float, 1>(p, stream) : launch_lists<float, 2>(p, stream);
  } else {
    p.columns == 1 ? launch_lists<int32_t, 1>(p, stream) : launch_lists<int32_t, 2>(p, stream);
  }
}

}  // namespace csfast::cuda
