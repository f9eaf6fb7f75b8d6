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

void check(const ExecuteParams& p, Device device) {
  check_neurons("execute", p.batch, p.n_neurons);
  check_width("execute", p.d);
  check_tile_rows("execute", p.tile_rows);
  if (device == Device::kCpu) {
    check_lists("execute", "tile", p.tile, p.n_tiles, p.batch,
                n_tiles_max(p.n_neurons, p.tile_rows));
  }
}

int64_t segments_of(int64_t n_tiles, int tile_rows) {
  const int64_t wanted = (n_tiles * tile_rows + kSegmentNeurons - 1) / kSegmentNeurons;
  return std::min({kSegments, wanted, n_tiles});
}

// The contribution of tiles [begin, end) of one row of the batch.
void sum_segment(const ExecuteParams& p, const void* x, const int32_t* tile, int64_t begin,
                 int64_t end, float* sum) {
  const Loops& loop = loops();
  if (p.tile_rows == 1) return loop.gather(p, x, tile + begin, end - begin, true, sum);
  int32_t neuron[kBlock];
  int64_t n = 0;
  bool first = true;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t from = int64_t{tile[t]} * p.tile_rows;
    const int64_t to = std::min(from + p.tile_rows, p.n_neurons);
    for (int64_t j = from; j < to; ++j) {
      neuron[n++] = static_cast<int32_t>(j);
      if (n == kBlock) {
        loop.gather(p, x, neuron, n, first, sum);
        first = false;
        n = 0;
      }
    }
  }
  if (n > 0 || first) loop.gather(p, x, neuron, n, first, sum);
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
  int32_t* n_done =                                   // (batch)
      reinterpret_cast<int32_t*>(workspace + line_up(p.batch * kSegments * p.d * 4));
  int64_t n_rows = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    n_done[b] = 0;
    n_rows += int64_t{p.n_tiles[b]} * p.tile_rows;
  }

  // Segments outside, batch inside: rows of a batch want much the same neurons, and find them in
  // the cache when they come at the same time.
#pragma omp parallel for schedule(dynamic) if (n_rows * 3 * p.d * size > kBytesAlone)
  for (int64_t item = 0; item < kSegments * p.batch; ++item) {
    const int64_t s = item / p.batch;
    const int64_t b = item % p.batch;
    const int64_t n_segments = segments_of(p.n_tiles[b], p.tile_rows);
    if (s >= std::max<int64_t>(n_segments, 1)) continue;
    float* row_sums = sums + b * kSegments * p.d;
    if (s < n_segments) {
      sum_segment(p, static_cast<const char*>(p.x) + b * p.d * size, p.tile + b * width,
                  p.n_tiles[b] * s / n_segments, p.n_tiles[b] * (s + 1) / n_segments,
                  row_sums + s * p.d);
    }
    // Whoever finishes the last segment adds them all up: nobody waits for anybody.
    if (std::atomic_ref(n_done[b]).fetch_add(1, std::memory_order_acq_rel) + 1 >= n_segments) {
      loop.finish(row_sums, n_segments, p.d, p.dtype, static_cast<char*>(p.out) + b * p.d * size);
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
