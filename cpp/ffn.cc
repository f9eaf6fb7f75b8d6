#include "csfast/ffn.h"

#include <algorithm>

#include "check.h"
#include "host.h"
#include "share.h"

namespace csfast {
namespace {

void check(const FfnParams& p, Device device) {
  const auto& [form, sensor, weights, decision] = p.layer;
  check_neurons("ffn", p.batch, form.n_neurons);
  check_width("ffn", form.d);
  check_code("ffn", form.d, sensor.code);
  check_group_rows("ffn", "tile_rows", decision.tile_rows);
  if (device == Device::kCpu && p.is_joint()) check_weights("ffn", decision.votes, p.batch);
}

void ffn_on_cpu(const FfnParams& p) {
  const int tile_rows = p.layer.decision.tile_rows;
  const int64_t n_neurons = p.layer.form.n_neurons;
  const int64_t width = n_tiles_max(n_neurons, tile_rows);
  // The two operations never work at the same time, so they share the rest of the workspace.
  char* at = static_cast<char*>(p.workspace);
  int32_t* tile = reinterpret_cast<int32_t*>(at);  // (batch, n_tiles_max)
  at += line_up(p.batch * width * 4);
  int32_t* n_tiles = reinterpret_cast<int32_t*>(at);  // (batch)
  at += line_up(p.batch * 4);
  int32_t* dropped = reinterpret_cast<int32_t*>(at);  // (batch)
  at += line_up(p.batch * 4);
  host::select(p.selection(at, tile, n_tiles, dropped));
  host::execute(p.execution(at, tile, n_tiles));
  const int64_t lists = p.is_joint() ? 1 : p.batch;
  for (int64_t list = 0; list < lists && p.dropped != nullptr; ++list) *p.dropped += dropped[list];
  if (p.stats == nullptr) return;
  p.stats[0] += p.batch;
  for (int64_t list = 0; list < lists; ++list) {
    int64_t neurons = int64_t{n_tiles[list]} * tile_rows;
    // The last tile may be short.
    if (n_tiles[list] > 0 && tile[list * width + n_tiles[list] - 1] == width - 1) {
      neurons -= width * tile_rows - n_neurons;
    }
    p.stats[1] += p.is_joint() ? p.batch * neurons : neurons;
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
