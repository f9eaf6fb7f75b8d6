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
  check_neurons("execute", p.batch, p.n_neurons);
  check_width("execute", p.d);
  check_group_rows("execute", "tile_rows", p.tile_rows);
  if (device == Device::kCpu) {
    check_lists("execute", "tile", p.tile, p.n_tiles, p.shared ? 1 : p.batch,
                n_tiles_max(p.n_neurons, p.tile_rows));
  }
}

int64_t segments_of(int64_t n_tiles, int tile_rows) {
  const int64_t wanted = (n_tiles * tile_rows + kSegmentNeurons - 1) / kSegmentNeurons;
  return std::min({kSegments, wanted, n_tiles});
}

// The contribution of tiles [begin, end) of one list to rows of the batch.
void sum_segment(const ExecuteParams& p, const Rows& rows, const int32_t* tile, int64_t begin,
                 int64_t end) {
  const Loops& loop = loops();
  if (p.tile_rows == 1) return loop.gather(p, rows, tile + begin, end - begin, true);
  int32_t neuron[kBlock];
  int64_t n = 0;
  bool first = true;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t from = int64_t{tile[t]} * p.tile_rows;
    const int64_t to = std::min(from + p.tile_rows, p.n_neurons);
    for (int64_t j = from; j < to; ++j) {
      neuron[n++] = static_cast<int32_t>(j);
      if (n == kBlock) {
        loop.gather(p, rows, neuron, n, first);
        first = false;
        n = 0;
      }
    }
  }
  if (n > 0 || first) loop.gather(p, rows, neuron, n, first);
}

}  // namespace

int64_t host::execute_workspace(int64_t batch, int64_t d) {
  return line_up(batch * kSegments * d * 4) + line_up(batch * 4);
}

void host::execute(const ExecuteParams& p) {
  const Loops& loop = loops();
  const int64_t width = n_tiles_max(p.n_neurons, p.tile_rows);
  const int64_t size = p.dtype == DType::kF32 ? 4 : 2;
  char* workspace = static_cast<char*>(p.workspace);
  float* sums = reinterpret_cast<float*>(workspace);  // (batch, kSegments, d)
  int32_t* n_done =                                   // (batch), of which the groups are used
      reinterpret_cast<int32_t*>(workspace + line_up(p.batch * kSegments * p.d * 4));
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
#pragma omp parallel for schedule(dynamic) if (n_rows * 3 * p.d * size > kBytesAlone)
  for (int64_t item = 0; item < kSegments * n_groups; ++item) {
    const int64_t s = item / n_groups;
    const int64_t group = item % n_groups;
    const int64_t n_tiles = p.n_tiles[list_of(group)];
    const int64_t n_segments = segments_of(n_tiles, p.tile_rows);
    if (s >= std::max<int64_t>(n_segments, 1)) continue;
    const int64_t first = group * group_rows;
    const int64_t end = std::min(first + group_rows, p.batch);
    if (s < n_segments) {
      const Rows rows{.x = static_cast<const char*>(p.x) + first * p.d * size,
                      .sum = sums + (first * kSegments + s) * p.d,
                      .sum_stride = kSegments * p.d,
                      .n = end - first};
      sum_segment(p, rows, p.tile + list_of(group) * width, n_tiles * s / n_segments,
                  n_tiles * (s + 1) / n_segments);
    }
    // Whoever finishes the last segment adds them all up: nobody waits for anybody.
    if (std::atomic_ref(n_done[group]).fetch_add(1, std::memory_order_acq_rel) + 1 < n_segments) {
      continue;
    }
    for (int64_t b = first; b < end; ++b) {
      loop.finish(sums + b * kSegments * p.d, n_segments, p.d, p.dtype, p.down_bias,
                  static_cast<char*>(p.out) + b * p.d * size);
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
