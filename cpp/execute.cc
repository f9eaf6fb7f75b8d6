#include "csfast/execute.h"

#include <algorithm>
#include <atomic>

#include "check.h"
#include "host.h"
#include "loops.h"
#include "share.h"

namespace csfast {
namespace {

// A row's tile list is cut into equal runs, each summed on its own: their number depends on the
// list alone, so the threads that there are decide nothing but the time. Adding 32 runs up reads
// 128 KB at d = 1024, in L2; runs of fewer neurons than 32 would spend more on adding up than they
// gain.
constexpr int64_t kSegments = 32;
constexpr int64_t kSegmentNeurons = 32;

// Rows of the batch that go through a segment of a shared list together: what they add to, 32 KB at
// d = 2048, stays in L2.
constexpr int64_t kRowsTogether = 4;

void check(const ExecuteParams& p, Device device) {
  check_neurons("execute", p.batch, p.form.n_neurons);
  check_width("execute", p.form.d);
  check_group_rows("execute", "tile_rows", p.tile_rows);
  if (device == Device::kCpu) {
    check_lists("execute", "tile", p.tile, p.n_tiles, p.shared ? 1 : p.batch,
                n_tiles_max(p.form.n_neurons, p.tile_rows));
  }
}

int64_t segments_of(int64_t n_tiles, int tile_rows) {
  const int64_t wanted = (n_tiles * tile_rows + kSegmentNeurons - 1) / kSegmentNeurons;
  return std::min({kSegments, wanted, n_tiles});
}

// Neurons of a list that the loops are shown at a time, and those of the next segment among them.
constexpr int64_t kShown = 256;
constexpr int64_t kAhead = 4;

// A run of tiles of one list.
struct Segment {
  const int32_t* tile;
  int64_t n_tiles;
};

// Calls f(j) for the neurons of a segment, in the order in which they are added up. Of a tile four
// rows are read together, each of which goes on in the next one: the processor's own prefetch goes
// on too, and rows that end on another page than they begin have a use for it.
template <typename F>
void for_neurons(const ExecuteParams& p, const Segment& segment, F&& f) {
  const int64_t apart = p.tile_rows % 4 == 0 ? p.tile_rows / 4 : 0;
  for (int64_t t = 0; t < segment.n_tiles; ++t) {
    const int64_t first = int64_t{segment.tile[t]} * p.tile_rows;
    for (int64_t row = 0; row < p.tile_rows; ++row) {
      const int64_t j = first + (apart > 0 ? row % 4 * apart + row / 4 : row);
      if (j < p.form.n_neurons) f(static_cast<int32_t>(j));
    }
  }
}

// The contribution of a segment to rows of the batch, while the start of the next is asked for.
void sum_segment(const ExecuteParams& p, const Rows& rows, const Segment& segment,
                 const Segment& next) {
  const Loops& loop = loops();
  int32_t neuron[kShown];
  int64_t n = 0;
  bool first = true;
  const auto gather = [&](int64_t n_ahead) {
    loop.gather(p, rows, neuron, n - n_ahead, n_ahead, first);
    first = false;
    std::copy(neuron + n - n_ahead, neuron + n, neuron);
    n = n_ahead;
  };
  for_neurons(p, segment, [&](int32_t j) {
    if (n == kShown - kAhead) gather(kAhead);
    neuron[n++] = j;
  });
  const int64_t own = n;
  for_neurons(p, {next.tile, std::min(next.n_tiles, kAhead)}, [&](int32_t j) {
    if (n < own + kAhead) neuron[n++] = j;
  });
  gather(n - own);
}

}  // namespace

int64_t host::execute_workspace(int64_t batch, int64_t d) {
  return line_up(batch * kSegments * d * 4) + line_up(batch * 4);
}

void host::execute(const ExecuteParams& p) {
  const Loops& loop = loops();
  const int64_t width = n_tiles_max(p.form.n_neurons, p.tile_rows);
  const int64_t size = p.form.dtype == DType::kF32 ? 4 : 2;
  char* workspace = static_cast<char*>(p.workspace);
  float* sums = reinterpret_cast<float*>(workspace);  // (batch, kSegments, d)
  int32_t* n_done =                                   // (batch), of which the groups are used
      reinterpret_cast<int32_t*>(workspace + line_up(p.batch * kSegments * p.form.d * 4));
  // Rows that share a list go through its weights together.
  const int64_t group_rows = p.shared ? kRowsTogether : 1;
  const int64_t n_groups = (p.batch + group_rows - 1) / group_rows;
  const auto list_of = [&](int64_t group) { return p.shared ? 0 : group; };
  int64_t n_rows = 0;
  for (int64_t group = 0; group < n_groups; ++group) {
    n_done[group] = 0;
    n_rows += int64_t{p.n_tiles[list_of(group)]} * p.tile_rows;
  }

  // Segments outside, batch inside: rows of a batch want much the same neurons, and find them in
  // the cache when they come at the same time.
  struct Work {
    int64_t group = 0;
    int64_t s = 0;
    int64_t n_segments = 0;
    Segment segment = {};
  };
  std::atomic<int64_t> n_taken = 0;
  const auto take = [&]() -> Work {
    for (;;) {
      const int64_t item = n_taken.fetch_add(1, std::memory_order_relaxed);
      if (item >= kSegments * n_groups) return {.group = n_groups};
      const int64_t s = item / n_groups;
      const int64_t group = item % n_groups;
      const int64_t n_tiles = p.n_tiles[list_of(group)];
      const int64_t n_segments = std::max<int64_t>(segments_of(n_tiles, p.tile_rows), 1);
      if (s >= n_segments) continue;
      const int64_t begin = n_tiles * s / n_segments;
      const int64_t end = n_tiles * (s + 1) / n_segments;
      return {group, s, n_segments, {p.tile + list_of(group) * width + begin, end - begin}};
    }
  };
#pragma omp parallel if (n_rows * 3 * p.form.d * size > kBytesAlone)
  for (Work now = take(), next; now.group < n_groups; now = next) {
    next = take();
    const int64_t first = now.group * group_rows;
    const int64_t end = std::min(first + group_rows, p.batch);
    const Rows rows{.x = static_cast<const char*>(p.x) + first * p.form.d * size,
                    .sum = sums + (first * kSegments + now.s) * p.form.d,
                    .sum_stride = kSegments * p.form.d,
                    .n = end - first};
    sum_segment(p, rows, now.segment, next.segment);
    // Whoever finishes the last segment adds them all up: nobody waits for anybody.
    std::atomic_ref n_finished(n_done[now.group]);
    if (n_finished.fetch_add(1, std::memory_order_acq_rel) + 1 < now.n_segments) continue;
    for (int64_t b = first; b < end; ++b) {
      loop.finish(sums + b * kSegments * p.form.d, now.n_segments, p.form.d, p.form.dtype,
                  p.weights.down_bias, static_cast<char*>(p.out) + b * p.form.d * size);
    }
  }
}

int64_t execute_workspace(int64_t batch, int64_t d, int64_t n_neurons, Device device) {
  check_neurons("execute", batch, n_neurons);
  check_width("execute", d);
  return device == Device::kCuda ? cuda::execute_workspace(batch, d, n_neurons)
                                 : host::execute_workspace(batch, d);
}

void execute(const ExecuteParams& p, Device device, Stream stream) {
  check(p, device);
  if (p.batch == 0) return;
  device == Device::kCuda ? cuda::execute(p, stream) : host::execute(p);
}

}  // namespace csfast
