#include "csfast/select.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "check.h"
#include "csfast/tile.h"
#include "groups.h"
#include "host.h"
#include "loops.h"
#include "share.h"

namespace csfast {
namespace {

constexpr int64_t kRowsAtOnce = 8;  // of the batch: their measurements of a block are 4 KB, in L1

void check(const SelectParams& p, Device device) {
  check_neurons("select", p.batch, p.form.n_neurons);
  check_width("select", p.form.d);
  check_code("select", p.form.d, p.sensor.code);
  check_group_rows("select", "tile_rows", p.decision.tile_rows);
  if (device == Device::kCpu && p.decision.votes != nullptr)
    check_weights("select", p.decision.votes, p.batch);
}

// The parts of the workspace.
struct Parts {
  int8_t* q;      // (batch, q_width)
  float* scale;   // (batch)
  float* usage;   // (batch, n_neurons), where tiles are of several neurons, rows decide together or
                  // there is a cap
  float* pooled;  // (lists, n_tiles_max), where there is a cap beside either of the others
  uint64_t* mask;  // (lists, n_blocks)
  float* missed;   // (lists, n_blocks)
};

// Blocks of neurons, or of tiles.
constexpr int64_t blocks_of(int64_t n) {
  return (n + kBlock - 1) / kBlock;
}

Parts cut(void* workspace, int64_t batch, int64_t d, int64_t n_neurons) {
  const int64_t lists = std::max<int64_t>(batch, 1);
  const int64_t n_blocks = blocks_of(n_neurons);
  char* at = static_cast<char*>(workspace);
  const auto take = [&at](int64_t bytes) {
    char* part = at;
    at += line_up(bytes);
    return part;
  };
  return {.q = reinterpret_cast<int8_t*>(take(batch * q_width(d))),
          .scale = reinterpret_cast<float*>(take(batch * 4)),
          .usage = reinterpret_cast<float*>(take(batch * n_neurons * 4)),
          .pooled = reinterpret_cast<float*>(take(lists * n_neurons * 4)),
          .mask = reinterpret_cast<uint64_t*>(take(lists * n_blocks * 8)),
          .missed = reinterpret_cast<float*>(take(lists * n_blocks * 4))};
}

// Whether a decision needs more than the usage of one neuron of one row.
bool is_pooled(const SelectParams& p) {
  return p.decision.tile_rows > 1 || p.decision.votes != nullptr;
}

// Sense and recover one block of neurons for every row of the batch, as far as the block goes.
void select_block(const SelectParams& p, const Parts& parts, int64_t block) {
  const Loops& loop = loops();
  const int64_t n_blocks = blocks_of(p.form.n_neurons);
  const int64_t first = block * kBlock;
  const int64_t n = std::min(kBlock, p.form.n_neurons - first);
  int32_t y[kRowsAtOnce * 2 * kBlock];
  float alone[kBlock];
  for (int64_t b0 = 0; b0 < p.batch; b0 += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, p.batch - b0);
    loop.measure(p.sensor.codes + first * 2 * row_bytes(p.form.d, p.sensor.code), 2 * n, p.form.d,
                 p.sensor.code, parts.q + b0 * q_width(p.form.d), rows, y, 2 * kBlock);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = b0 + i;
      const bool is_stored = is_pooled(p) || p.decision.cap != nullptr;
      float* usage = is_stored ? parts.usage + b * p.form.n_neurons + first : alone;
      loop.usage({.y = y + i * 2 * kBlock,
                  .row_scale = p.sensor.row_scale + 2 * first,
                  .offset = p.sensor.offset == nullptr ? nullptr : p.sensor.offset + 2 * first,
                  .scale = parts.scale[b],
                  .columns = 2,
                  .is_float = false,
                  .activation = p.form.activation},
                 n, usage);
      if (is_pooled(p)) continue;
      const Votes votes{.none = false, .all = !std::isfinite(parts.scale[b])};
      const Kept kept = loop.keep(usage, n, threshold_of(votes, p.decision.threshold[b]));
      parts.mask[b * n_blocks + block] = kept.mask;
      parts.missed[b * n_blocks + block] = kept.missed;
    }
  }
}

// Recover one block of tiles of one list from the usages of its neurons.
void keep_block(const SelectParams& p, const Parts& parts, Votes votes, int64_t list,
                int64_t block) {
  const int64_t n_tiles = n_tiles_max(p.form.n_neurons, p.decision.tile_rows);
  const int64_t n = std::min(kBlock, n_tiles - block * kBlock);
  const int64_t first = block * kBlock * p.decision.tile_rows;  // neuron
  const int64_t n_neurons = std::min(n * p.decision.tile_rows, p.form.n_neurons - first);
  float usage[kBlock] = {};
  const auto of_row = [&](int64_t b, float* group) {
    const float* neurons = parts.usage + b * p.form.n_neurons + first;
    if (p.decision.tile_rows == 1) {
      std::copy(neurons, neurons + n, group);
    } else {
      group_usage(neurons, n_neurons, p.decision.tile_rows, group);
    }
  };
  if (p.decision.votes == nullptr) {
    of_row(list, usage);
  } else {
    float row[kBlock];
    for (int64_t b = 0; b < p.batch; ++b) {
      if (p.decision.votes[b] == 0.0f) continue;
      of_row(b, row);
      add_usage(row, n, p.decision.votes[b], usage);
    }
  }
  if (p.decision.cap != nullptr)
    std::copy(usage, usage + n, parts.pooled + list * n_tiles + block * kBlock);
  const int64_t at = list * blocks_of(n_tiles) + block;
  const Kept kept = loops().keep(usage, n, threshold_of(votes, p.decision.threshold[list]));
  parts.mask[at] = kept.mask;
  parts.missed[at] = kept.missed;
}

// From the masks of one list to its tiles, or from its usages if the cap asks for it.
void list_tiles(const SelectParams& p, const Parts& parts, Votes votes, int64_t list) {
  const int64_t n_tiles = n_tiles_max(p.form.n_neurons, p.decision.tile_rows);
  const int64_t n_blocks = blocks_of(n_tiles);
  int32_t* tile = p.tile + list * n_tiles;
  if (p.dropped != nullptr) p.dropped[list] = 0;
  if (p.decision.cap != nullptr && !votes.all) {
    const int32_t cap = std::max(p.decision.cap[list], 0);
    int32_t wanted = 0;
    for (int64_t block = 0; block < n_blocks; ++block) {
      wanted += std::popcount(parts.mask[list * n_blocks + block]);
    }
    if (wanted > cap) {
      const float* usage = (is_pooled(p) ? parts.pooled : parts.usage) + list * n_tiles;
      float missed = 0.0f;
      p.n_tiles[list] = keep_top(usage, n_tiles, cap, tile, &missed);
      std::fill(tile + p.n_tiles[list], tile + n_tiles, 0);
      if (p.dropped != nullptr) p.dropped[list] = wanted - cap;
      if (p.missed != nullptr) p.missed[list] = missed;
      return;
    }
  }
  int32_t count = 0;
  float missed = 0.0f;
  for (int64_t block = 0; block < n_blocks; ++block) {
    missed += parts.missed[list * n_blocks + block];
    for (uint64_t mask = parts.mask[list * n_blocks + block]; mask != 0; mask &= mask - 1) {
      tile[count++] = static_cast<int32_t>(block * kBlock + std::countr_zero(mask));
    }
  }
  std::fill(tile + count, tile + n_tiles, 0);
  p.n_tiles[list] = count;
  if (p.missed != nullptr) p.missed[list] = missed;
}

}  // namespace

int64_t host::select_workspace(int64_t batch, int64_t d, int64_t n_neurons) {
  const int64_t lists = std::max<int64_t>(batch, 1);
  const int64_t n_blocks = blocks_of(n_neurons);
  return line_up(batch * q_width(d)) + line_up(batch * 4) + line_up(batch * n_neurons * 4) +
         line_up(lists * n_neurons * 4) + line_up(lists * n_blocks * 8) +
         line_up(lists * n_blocks * 4);
}

void host::select(const SelectParams& p) {
  const Loops& loop = loops();
  const Parts parts = cut(p.workspace, p.batch, p.form.d, p.form.n_neurons);
  const int64_t x_bytes = p.form.d * (p.form.dtype == DType::kF32 ? 4 : 2);
  for (int64_t b = 0; b < p.batch; ++b) {
    parts.scale[b] = loop.quantize(static_cast<const char*>(p.x) + b * x_bytes, p.sensor.equal,
                                   p.form.d, p.form.dtype, parts.q + b * q_width(p.form.d));
  }
  const int64_t n_blocks = blocks_of(p.form.n_neurons);
#pragma omp parallel for schedule( \
        dynamic) if (p.form.n_neurons * 2 * row_bytes(p.form.d, p.sensor.code) > kBytesAlone)
  for (int64_t block = 0; block < n_blocks; ++block) select_block(p, parts, block);

  const int64_t lists = p.decision.votes == nullptr ? p.batch : 1;
  const auto votes = [&](int64_t list) {
    if (p.decision.votes != nullptr) return votes_of(p.decision.votes, parts.scale, p.batch);
    return Votes{.none = false, .all = !std::isfinite(parts.scale[list])};
  };
  if (is_pooled(p)) {
    const int64_t n_tile_blocks = blocks_of(n_tiles_max(p.form.n_neurons, p.decision.tile_rows));
#pragma omp parallel for if (p.batch * p.form.n_neurons * 4 > kBytesAlone)
    for (int64_t item = 0; item < lists * n_tile_blocks; ++item) {
      const int64_t list = item / n_tile_blocks;
      keep_block(p, parts, votes(list), list, item % n_tile_blocks);
    }
  }
  for (int64_t list = 0; list < lists; ++list) list_tiles(p, parts, votes(list), list);
}

int64_t select_workspace(int64_t batch, int64_t d, int64_t n_neurons, Device device) {
  check_neurons("select", batch, n_neurons);
  check_width("select", d);
  return device == Device::kCuda ? cuda::select_workspace(batch, d, n_neurons)
                                 : host::select_workspace(batch, d, n_neurons);
}

void select(const SelectParams& p, Device device, Stream stream) {
  check(p, device);
  if (p.batch == 0 && p.decision.votes == nullptr) return;
  device == Device::kCuda ? cuda::select(p, stream) : host::select(p);
}

}  // namespace csfast
