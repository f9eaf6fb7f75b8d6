// Encode on CUDA: for every column one block a lane searches its path, then every row takes its
// value and moves the columns of the block that come after.
//
// Bound by latency: a column waits for the one before, a step of its search for the step before. A
// thread has one state; what it chose is a bit of a ballot. The path is read back in shared memory
// where its bits fit there. Rounds as the CPU does, so that codes are the same.
#include <cstddef>

#include "common/launch.cuh"
#include "common/warp.cuh"
#include "csfast/encode.h"

namespace csfast::cuda {
namespace {

constexpr int kColumns = 64;   // whose errors are spread over the rest at once, as on the CPU
constexpr int kThreads = 256;  // of all kernels but the search
constexpr int kLevels = 2 << kTrellisBitsMax;
constexpr int kSharedMost = 160 << 10;  // bytes of ballots that are kept on chip
constexpr float kNoPath = 1e30f;

struct Work {
  EncodeParams p;
  float* left;      // (rows, cols), what is left to code
  float* part;      // (kColumns, rows): the columns of a block, as feedback has left them
  float* error;     // (kColumns, rows), in units of the diagonal
  float* inverse;   // (rows), of the step; 0 where it is 0
  float* weight;    // (rows), of a squared error
  float4* least;    // (kLanes, steps): the least weighted error of each subset
  uchar4* best;     // (kLanes, steps): its level
  uint32_t* older;  // (kLanes, steps, words): whether the oldest bit was 1, a bit a state
  uint8_t* index;   // (steps, kLanes)
  uint8_t* u;       // (steps, kLanes)
  int64_t steps;
  int64_t first;  // column of a block
  int n;          // columns of it
  int c;          // column within it
  bool on_chip;   // older
};

int64_t steps_of(int64_t rows) {
  return (rows + kLanes - 1) / kLanes;
}

// Of ballots, for each step.
constexpr int words_of(int nu) {
  return nu > 5 ? 1 << (nu - 5) : 1;
}

// Weights of rows, by the largest step.
__global__ void __launch_bounds__(kThreads) prepare_kernel(const Work w) {
  __shared__ float most[kThreads];
  float largest = 0.0f;
  for (int64_t r = threadIdx.x; r < w.p.rows; r += kThreads) largest = fmaxf(largest, w.p.step[r]);
  most[threadIdx.x] = largest;
  __syncthreads();
  for (int i = kThreads / 2; i > 0; i /= 2) {
    if (threadIdx.x < i) most[threadIdx.x] = fmaxf(most[threadIdx.x], most[threadIdx.x + i]);
    __syncthreads();
  }
  for (int64_t r = threadIdx.x; r < w.p.rows; r += kThreads) {
    const float step = w.p.step[r];
    const float share = step > 0.0f ? __fdiv_rn(step, most[0]) : 0.0f;
    w.inverse[r] = step > 0.0f ? __fdiv_rn(1.0f, step) : 0.0f;
    w.weight[r] = __fmul_rn(share, share);
  }
}

// A block of columns to their own array.
__global__ void __launch_bounds__(kThreads) take_kernel(const Work w) {
  const int64_t r = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (r >= w.p.rows) return;
  for (int c = 0; c < w.n; ++c) {
    w.part[c * w.p.rows + r] = w.left[r * w.p.cols + w.first + c];
  }
}

// The best level of each subset, for every weight of a column.
__global__ void __launch_bounds__(kThreads) weigh_kernel(const Work w) {
  __shared__ float level[kLevels];
  const int levels = 2 << w.p.bits;
  if (static_cast<int>(threadIdx.x) < levels) level[threadIdx.x] = w.p.table[threadIdx.x];
  __syncthreads();  // levels are written by other threads
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= w.steps * kLanes) return;
  float x = 0.0f, weight = 0.0f;
  if (row < w.p.rows) {
    x = __fmul_rn(w.part[w.c * w.p.rows + row], w.inverse[row]);
    weight = w.weight[row];
  }
  float least[4];
  int best[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    least[j] = kNoPath;
    best[j] = 0;
    for (int i = j; i < levels; i += 4) {
      const float off = __fsub_rn(x, level[i]);
      const float square = __fmul_rn(off, off);
      if (square < least[j]) {
        least[j] = square;
        best[j] = i;
      }
    }
    least[j] = __fmul_rn(least[j], weight);
  }
  const int64_t at = row % kLanes * w.steps + row / kLanes;
  w.least[at] = make_float4(least[0], least[1], least[2], least[3]);
  w.best[at] = make_uchar4(best[0], best[1], best[2], best[3]);
}

// One lane a block, one state a thread.
__global__ void __launch_bounds__(1 << kTrellisMemoryMax) search_kernel(const Work w) {
  extern __shared__ uint32_t on_chip[];
  __shared__ float cost[2][1 << kTrellisMemoryMax];
  const int states = 1 << w.p.nu;
  const int words = words_of(w.p.nu);
  const int state = static_cast<int>(threadIdx.x);
  const int lane = static_cast<int>(blockIdx.x);
  const Polynomials h = polynomials_of(w.p.nu);
  const int young = state / 2;
  const int old = young + states / 2;
  const uint32_t young_subset = subset_of(2 * young + state % 2, h);
  const uint32_t old_subset = subset_of(2 * old + state % 2, h);
  const float4* least = w.least + lane * w.steps;
  uint32_t* older = w.on_chip ? on_chip : w.older + lane * w.steps * words;
  const uint32_t mask = states < kWarp ? (1u << states) - 1 : 0xffffffffu;  // nu < 5: a part
  const auto of = [](const float4& all, uint32_t subset) {
    const float low = subset & 1 ? all.y : all.x;
    const float high = subset & 1 ? all.w : all.z;
    return subset & 2 ? high : low;
  };

  cost[0][state] = state == 0 ? 0.0f : kNoPath;
  __syncthreads();  // the first step reads what other threads wrote
  float4 next = least[0];
  for (int64_t s = 0; s < w.steps; ++s) {
    const float4 now = next;
    if (s + 1 < w.steps) next = least[s + 1];
    const float a = __fadd_rn(cost[s % 2][young], of(now, young_subset));
    const float b = __fadd_rn(cost[s % 2][old], of(now, old_subset));
    const bool is_older = b < a;
    cost[(s + 1) % 2][state] = is_older ? b : a;
    const uint32_t bits = __ballot_sync(mask, is_older);
    if (state % kWarp == 0) older[s * words + state / kWarp] = bits;
    __syncthreads();  // orders the costs of this step before the next one's reads
  }
  if (state != 0) return;
  const float* last = cost[w.steps % 2];
  int at = 0;
  for (int i = 1; i < states; ++i) {
    if (last[i] < last[at]) at = i;
  }
  for (int64_t s = w.steps - 1; s >= 0; --s) {
    const uint32_t bits = older[s * words + at / kWarp];
    const int before = at / 2 + static_cast<int>(bits >> (at % kWarp) & 1) * (states / 2);
    const uint32_t subset = subset_of(2 * before + at % 2, h);
    const uchar4 best = w.best[lane * w.steps + s];
    const uint8_t low = subset & 1 ? best.y : best.x;
    const uint8_t high = subset & 1 ? best.w : best.z;
    w.index[s * kLanes + lane] = subset & 2 ? high : low;
    w.u[s * kLanes + lane] = static_cast<uint8_t>(at % 2);
    at = before;
  }
}

// What a column's codes leave undone moves the columns of its block; one thread has the rows that
// share a byte.
__global__ void __launch_bounds__(kThreads) feedback_kernel(const Work w) {
  __shared__ float spread[kColumns];
  const EncodeParams& p = w.p;
  const int left = w.n - w.c;
  if (static_cast<int>(threadIdx.x) < left) {
    spread[threadIdx.x] = p.feedback[(w.first + w.c) * p.cols + w.first + w.c + threadIdx.x];
  }
  __syncthreads();  // spread is written by other threads
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t tile = thread / kLanes;
  const int lane = static_cast<int>(thread % kLanes);
  if (tile >= trellis_row_tiles(p.rows)) return;
  const float scale = __fdiv_rn(1.0f, spread[0]);
  const int64_t col = w.first + w.c;
  uint8_t* codes = p.codes +
                   (tile * trellis_col_tiles(p.cols) + col / kTrellisCols) * p.bits * kTileBytes +
                   byte_of(lane, col);
  int packed[kTrellisBitsMax] = {};
#pragma unroll 1
  for (int step = 0; step < kLaneSteps; ++step) {
    const int64_t r = tile * kTrellisRows + step * kLanes + lane;
    if (r >= p.rows) break;
    const int index = w.index[r];
    const int raw = index >> 2;
    const int place = place_of(r, col);
    packed[0] |= w.u[r] << place;
    if (p.bits == 2) packed[1] |= raw << raw_bit_of(place);
    if (p.bits >= 3) packed[place < 4 ? 1 : 2] |= (raw & 3) << 2 * (place % 4);
    if (p.bits == 4) packed[3] |= raw >> 2 << place;
    const int8_t value = p.table[index];
    p.value[r * p.cols + col] = value;
    float* part = w.part + w.c * p.rows + r;
    const float wrong =
        __fmul_rn(__fsub_rn(*part, __fmul_rn(p.step[r], static_cast<float>(value))), scale);
    w.error[w.c * p.rows + r] = wrong;
    for (int j = 1; j < left; ++j) {
      part[j * p.rows] = __fsub_rn(part[j * p.rows], __fmul_rn(spread[j], wrong));
    }
  }
#pragma unroll
  for (int b = 0; b < kTrellisBitsMax; ++b) {
    // The byte has a column before this one, too.
    if (b < p.bits) codes[b * kTileBytes] |= static_cast<uint8_t>(packed[b]);
  }
}

// What a block of columns leaves undone moves the columns after it.
__global__ void __launch_bounds__(kThreads) spread_kernel(const Work w) {
  const EncodeParams& p = w.p;
  const int64_t rest = w.first + w.n;
  const int64_t j = rest + int64_t{blockIdx.y} * kThreads + threadIdx.x;
  if (j >= p.cols) return;
  const int64_t r = blockIdx.x;
  float left = w.left[r * p.cols + j];
  for (int c = 0; c < w.n; ++c) {
    left =
        __fsub_rn(left, __fmul_rn(w.error[c * p.rows + r], p.feedback[(w.first + c) * p.cols + j]));
  }
  w.left[r * p.cols + j] = left;
}

// The parts of the workspace, in order; `base` may be null to learn their size.
int64_t lay_out(Work& w, void* base) {
  char* at = static_cast<char*>(base);
  int64_t bytes = 0;
  const auto take = [&]<typename E>(E*& pointer, int64_t count) {
    pointer = reinterpret_cast<E*>(at + bytes);
    bytes += (count * static_cast<int64_t>(sizeof(E)) + 255) / 256 * 256;
  };
  const EncodeParams& p = w.p;
  take(w.left, p.rows * p.cols);
  take(w.part, kColumns * p.rows);
  take(w.error, kColumns * p.rows);
  take(w.inverse, p.rows);
  take(w.weight, p.rows);
  take(w.least, kLanes * w.steps);
  take(w.best, kLanes * w.steps);
  take(w.older, kLanes * w.steps * words_of(p.nu));
  take(w.index, kLanes * w.steps);
  take(w.u, kLanes * w.steps);
  return bytes;
}

}  // namespace

int64_t encode_workspace(int64_t rows, int64_t cols) {
  Work w{};
  w.p.rows = rows;
  w.p.cols = cols;
  w.p.nu = kTrellisMemoryMax;
  w.steps = steps_of(rows);
  return lay_out(w, nullptr);
}

void encode(const EncodeParams& p, Stream stream) {
  Work w{};
  w.p = p;
  w.steps = steps_of(p.rows);
  lay_out(w, p.workspace);
  const Queue queue(stream);
  const int ballots =
      static_cast<int>(w.steps) * words_of(p.nu) * static_cast<int>(sizeof(uint32_t));
  w.on_chip = w.steps * words_of(p.nu) * 4 <= kSharedMost;
  const int64_t code_bytes =
      trellis_row_tiles(p.rows) * trellis_col_tiles(p.cols) * p.bits * kTileBytes;
  check(cudaMemcpyAsync(w.left, p.w, p.rows * p.cols * sizeof(float), cudaMemcpyDeviceToDevice,
                        static_cast<cudaStream_t>(stream)),
        "encode", "copy", "cudaMemcpyAsync");
  check(cudaMemsetAsync(p.codes, 0, code_bytes, static_cast<cudaStream_t>(stream)), "encode",
        "clear", "cudaMemsetAsync");
  const dim3 threads(kThreads);
  const auto blocks = [](int64_t n) {
    return dim3(static_cast<unsigned>((n + kThreads - 1) / kThreads));
  };
  launch("encode", "prepare", prepare_kernel, dim3(1), threads, queue, w);
  for (w.first = 0; w.first < p.cols; w.first += kColumns) {
    w.n = static_cast<int>(p.cols - w.first < kColumns ? p.cols - w.first : kColumns);
    launch("encode", "take", take_kernel, blocks(p.rows), threads, queue, w);
    for (w.c = 0; w.c < w.n; ++w.c) {
      launch("encode", "weigh", weigh_kernel, blocks(w.steps * kLanes), threads, queue, w);
      launch("encode", "search", search_kernel, dim3(kLanes), dim3(1u << p.nu), queue, w,
             {.shared_bytes = w.on_chip ? ballots : 0});
      launch("encode", "feedback", feedback_kernel, blocks(trellis_row_tiles(p.rows) * kLanes),
             threads, queue, w);
    }
    const int64_t rest = p.cols - w.first - w.n;
    if (rest == 0) break;
    dim3 grid = blocks(rest);
    grid = dim3(static_cast<unsigned>(p.rows), grid.x);
    launch("encode", "spread", spread_kernel, grid, threads, queue, w);
  }
}

}  // namespace csfast::cuda
