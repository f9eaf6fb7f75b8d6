#include "csfast/select.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "check.h"
#include "csfast/tile.h"
#include "host.h"
#include "loops.h"
#include "share.h"

namespace csfast {
namespace {

constexpr int64_t kRowsAtOnce = 8;  // of the batch: their measurements of a block are 4 KB, in L1

void check(const SelectParams& p) {
  check_neurons("select", p.batch, p.n_neurons);
  check_width("select", p.d);
  check_code("select", p.d, p.code);
  check_tile_rows("select", p.tile_rows);
}

// The parts of the workspace.
struct Parts {
  int8_t* q;       // (batch, q_width)
  float* scale;    // (batch)
  uint64_t* mask;  // (batch, n_blocks)
  float* missed;   // (batch, n_blocks)
};

constexpr int64_t blocks_of(int64_t n_neurons) {
  return (n_neurons + kBlock - 1) / kBlock;
}

Parts cut(void* workspace, int64_t batch, int64_t d, int64_t n_neurons) {
  const int64_t n_blocks = blocks_of(n_neurons);
  char* at = static_cast<char*>(workspace);
  const auto take = [&at](int64_t bytes) {
    char* part = at;
    at += line_up(bytes);
    return part;
  };
  return {.q = reinterpret_cast<int8_t*>(take(batch * q_width(d))),
          .scale = reinterpret_cast<float*>(take(batch * 4)),
          .mask = reinterpret_cast<uint64_t*>(take(batch * n_blocks * 8)),
          .missed = reinterpret_cast<float*>(take(batch * n_blocks * 4))};
}

// Sense and recover one block of neurons for every row of the batch.
void select_block(const SelectParams& p, const Parts& parts, int64_t block) {
  const Loops& loop = loops();
  const int64_t n_blocks = blocks_of(p.n_neurons);
  const int64_t first = block * kBlock;
  const int64_t n = std::min(kBlock, p.n_neurons - first);
  int32_t y[kRowsAtOnce * 2 * kBlock];
  float usage[kBlock];
  for (int64_t b0 = 0; b0 < p.batch; b0 += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, p.batch - b0);
    loop.measure(p.codes + first * 2 * row_bytes(p.d, p.code), 2 * n, p.d, p.code,
                 parts.q + b0 * q_width(p.d), rows, y, 2 * kBlock);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = b0 + i;
      const bool all = !std::isfinite(parts.scale[b]);
      const Kept kept =
          loop.keep(y + i * 2 * kBlock, parts.scale[b], p.row_scale + 2 * first, n,
                    all ? -std::numeric_limits<float>::infinity() : p.threshold[b], usage);
      parts.mask[b * n_blocks + block] = kept.mask;
      parts.missed[b * n_blocks + block] = kept.missed;
    }
  }
}

// From the masks of one row of the batch to its tiles.
void list_tiles(const SelectParams& p, const Parts& parts, int64_t b) {
  const int64_t n_blocks = blocks_of(p.n_neurons);
  const uint64_t* masks = parts.mask + b * n_blocks;
  int32_t* tile = p.tile + b * n_tiles_max(p.n_neurons, p.tile_rows);
  int32_t count = 0;
  float missed = 0.0f;
  for (int64_t block = 0; block < n_blocks; ++block) {
    missed += parts.missed[b * n_blocks + block];
    for (uint64_t mask = masks[block]; mask != 0; mask &= mask - 1) {
      const int32_t j = static_cast<int32_t>(block * kBlock + std::countr_zero(mask));
      const int32_t t = p.tile_rows == 1 ? j : j / p.tile_rows;
      if (count == 0 || tile[count - 1] != t) tile[count++] = t;
    }
  }
  p.n_tiles[b] = count;
  if (p.missed != nullptr) p.missed[b] = missed;
}

}  // namespace

int64_t host::select_workspace(int64_t batch, int64_t d, int64_t n_neurons) {
  const int64_t n_blocks = blocks_of(n_neurons);
  return line_up(batch * q_width(d)) + line_up(batch * 4) + line_up(batch * n_blocks * 8) +
         line_up(batch * n_blocks * 4);
}

void host::select(const SelectParams& p) {
  const Loops& loop = loops();
  const Parts parts = cut(p.workspace, p.batch, p.d, p.n_neurons);
  const int64_t x_bytes = p.d * (p.dtype == DType::kF32 ? 4 : 2);
  for (int64_t b = 0; b < p.batch; ++b) {
    parts.scale[b] = loop.quantize(static_cast<const char*>(p.x) + b * x_bytes, p.equal, p.d,
                                   p.dtype, parts.q + b * q_width(p.d));
  }
  const int64_t n_blocks = blocks_of(p.n_neurons);
#pragma omp parallel for schedule(dynamic) if (p.n_neurons * 2 * row_bytes(p.d, p.code) > \
                                                   kBytesAlone)
  for (int64_t block = 0; block < n_blocks; ++block) select_block(p, parts, block);
  for (int64_t b = 0; b < p.batch; ++b) list_tiles(p, parts, b);
}

int64_t select_workspace(int64_t batch, int64_t d, int64_t n_neurons, Device device) {
  check_neurons("select", batch, n_neurons);
  check_width("select", d);
  return device == Device::kCuda ? cuda::select_workspace(batch, d, n_neurons)
                                 : host::select_workspace(batch, d, n_neurons);
}

void select(const SelectParams& p, Device device, Stream stream) {
  check(p);
  if (p.batch == 0) return;
  device == Device::kCuda ? cuda::select(p, stream) : host::select(p);
}

}  // namespace csfast
