#include "csfast/ffn.h"

#include <algorithm>

#include "check.h"
#include "host.h"
#include "share.h"

namespace csfast {
namespace {

void check(const FfnParams& p, Device device) {
  check_neurons("ffn", p.batch, p.n_neurons);
  check_width("ffn", p.d);
  check_code("ffn", p.d, p.code);
  check_group_rows("ffn", "tile_rows", p.tile_rows);
  if (device == Device::kCpu && p.weight != nullptr) check_weights("ffn", p.weight, p.batch);
}

void ffn_on_cpu(const FfnParams& p) {
  const int64_t width = n_tiles_max(p.n_neurons, p.tile_rows);
  // The two operations never work at the same time, so they share the rest of the workspace.
  char* at = static_cast<char*>(p.workspace);
  int32_t* tile = reinterpret_cast<int32_t*>(at);  // (batch, n_tiles_max)
  at += line_up(p.batch * width * 4);
  int32_t* n_tiles = reinterpret_cast<int32_t*>(at);  // (batch)
  at += line_up(p.batch * 4);
  int32_t* dropped = reinterpret_cast<int32_t*>(at);  // (batch)
  at += line_up(p.batch * 4);
  host::select({.codes = p.codes,
                .equal = p.equal,
                .row_scale = p.row_scale,
                .offset = p.offset,
                .weight = p.weight,
                .threshold = p.threshold,
                .cap = p.cap,
                .x = p.x,
                .workspace = at,
                .tile = tile,
                .n_tiles = n_tiles,
                .dropped = dropped,
                .missed = nullptr,
                .batch = p.batch,
                .d = p.d,
                .n_neurons = p.n_neurons,
                .code = p.code,
                .tile_rows = p.tile_rows,
                .dtype = p.dtype,
                .activation = p.activation});
  host::execute({.gate = p.gate,
                 .up = p.up,
                 .down_t = p.down_t,
                 .gate_bias = p.gate_bias,
                 .up_bias = p.up_bias,
                 .down_bias = p.down_bias,
                 .x = p.x,
                 .tile = tile,
                 .n_tiles = n_tiles,
                 .workspace = at,
                 .out = p.out,
                 .batch = p.batch,
                 .d = p.d,
                 .n_neurons = p.n_neurons,
                 .tile_rows = p.tile_rows,
                 .shared = p.weight != nullptr,
                 .dtype = p.dtype,
                 .activation = p.activation});
  const bool shared = p.weight != nullptr;  // one list, which every row of the batch executes
  for (int64_t list = 0; list < (shared ? 1 : p.batch) && p.dropped != nullptr; ++list) {
    *p.dropped += dropped[list];
  }
  if (p.stats == nullptr) return;
  p.stats[0] += p.batch;
  for (int64_t list = 0; list < (shared ? 1 : p.batch); ++list) {
    int64_t neurons = int64_t{n_tiles[list]} * p.tile_rows;
    // The last tile may be short.
    if (n_tiles[list] > 0 && tile[list * width + n_tiles[list] - 1] == width - 1) {
      neurons -= width * p.tile_rows - p.n_neurons;
    }
    p.stats[1] += shared ? p.batch * neurons : neurons;
  }
}

}  // namespace

int64_t ffn_workspace(int64_t batch, int64_t d, int64_t n_neurons, Device device) {
  check_neurons("ffn", batch, n_neurons);
  check_width("ffn", d);
  if (device == Device::kCuda) return cuda::ffn_workspace(batch, d, n_neurons);
  return line_up(batch * n_neurons * 4) + 2 * line_up(batch * 4) +
         std::max(host::select_workspace(batch, d, n_neurons), host::execute_workspace(batch, d));
}

void ffn(const FfnParams& p, Device device, Stream stream) {
  check(p, device);
  if (p.batch == 0) return;
  device == Device::kCuda ? cuda::ffn(p, stream) : ffn_on_cpu(p);
}

}  // namespace csfast
