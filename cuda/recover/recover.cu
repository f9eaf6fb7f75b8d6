// Recover on CUDA: one block per list, that is per row of the batch or for all rows together.
//
// Reads 16 bytes a neuron and row and writes 8; what bounds it is the latency of one block going
// over its neurons a few times: usages, for top-k four rounds of counting, then compaction.
#include "common/compact.cuh"
#include "common/launch.cuh"
#include "csfast/recover.h"
#include "recover/rank.cuh"
#include "recover/usage.cuh"

namespace csfast::cuda {
namespace {

constexpr int kThreads = kRankThreads;

struct Shared {
  CompactShared compact;
  RankShared rank;
};

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
  const Votes votes = votes_of(p.votes, p.scale, p.batch, list);

  // Usage
  for (int64_t group = threadIdx.x; group < n; group += kThreads) {
    const auto of_row = [&](int64_t b) {
      return group_usage(group, p.n_neurons, p.group_rows,
                         [&](int64_t j) { return neuron_usage<Y, kColumns>(p, y, b, j); });
    };
    usage[group] = p.votes == nullptr ? of_row(list) : joint_usage(p.votes, p.batch, of_row);
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
      find_last_key(shared.rank, usage, n, static_cast<int>(budget));
    }
    const unsigned last = shared.rank.prefix;
    const int ties = everything || nothing ? 0 : shared.rank.left;
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
  const auto lists = static_cast<unsigned>(p.votes == nullptr ? p.batch : 1);
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
