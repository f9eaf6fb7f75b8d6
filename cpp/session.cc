#include "csfast/session.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "check.h"

namespace csfast {

int64_t Session::bind(const FfnParams& p) {
  const auto& [form, sensor, weights, decision] = p.layer;
  check_neurons("session", p.batch, form.n_neurons);
  check_width("session", form.d);
  check_code("session", form.d, sensor.code);
  check_group_rows("session", "tile_rows", decision.tile_rows);
  Bound bound{.params = p, .prepared = {}};
  const int64_t prepared = device_ == Device::kCuda ? std::min(p.batch, kPreparedMax) : 0;
  for (int64_t batch = 1; batch <= prepared; ++batch) {
    FfnParams of_batch = p;
    of_batch.batch = batch;
    bound.prepared.push_back(cuda::replay(of_batch));
  }
  layers_.push_back(std::move(bound));
  return n_layers() - 1;
}

void Session::ffn(int64_t layer, const void* x, void* out, int64_t batch, Stream stream) {
  if (layer < 0 || layer >= n_layers()) {
    throw std::invalid_argument("[session] layer = " + std::to_string(layer) +
                                ": want one of the " + std::to_string(n_layers()) + " bound.");
  }
  Bound& bound = layers_[static_cast<size_t>(layer)];
  if (batch < 0 || batch > bound.params.batch) {
    throw std::invalid_argument("[session] batch = " + std::to_string(batch) + ": layer " +
                                std::to_string(layer) + " was bound for at most " +
                                std::to_string(bound.params.batch) + ".");
  }
  if (batch == 0) return;
  const bool is_aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
  if (is_aligned && batch <= static_cast<int64_t>(bound.prepared.size())) {
    return bound.prepared[static_cast<size_t>(batch - 1)].run(x, out, stream);
  }
  FfnParams p = bound.params;
  p.x = x;
  p.out = out;
  p.batch = batch;
  csfast::ffn(p, device_, stream);
}

}  // namespace csfast
