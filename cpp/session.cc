#include "csfast/session.h"

#include <stdexcept>
#include <string>

#include "check.h"

namespace csfast {

int64_t Session::bind(const FfnParams& p) {
  const auto& [form, sensor, weights, decision] = p.layer;
  check_neurons("session", p.batch, form.n_neurons);
  check_width("session", form.d);
  check_code("session", form.d, sensor.code);
  check_group_rows("session", "tile_rows", decision.tile_rows);
  layers_.push_back(p);
  return n_layers() - 1;
}

void Session::ffn(int64_t layer, const void* x, void* out, int64_t batch, Stream stream) const {
  if (layer < 0 || layer >= n_layers()) {
    throw std::invalid_argument("[session] layer = " + std::to_string(layer) +
                                ": want one of the " + std::to_string(n_layers()) + " bound.");
  }
  FfnParams p = layers_[static_cast<size_t>(layer)];
  if (batch < 0 || batch > p.batch) {
    throw std::invalid_argument("[session] batch = " + std::to_string(batch) + ": layer " +
                                std::to_string(layer) + " was bound for at most " +
                                std::to_string(p.batch) + ".");
  }
  p.x = x;
  p.out = out;
  p.batch = batch;
  csfast::ffn(p, device_, stream);
}

}  // namespace csfast
