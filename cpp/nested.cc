#include "csfast/nested.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "check.h"
#include "loops.h"
#include "share.h"

namespace csfast {
namespace {

[[noreturn]] void refuse(const std::string& given, const std::string& wanted) {
  throw std::invalid_argument("[nested] " + given + ": want " + wanted + ".");
}

void check(const NestedParams& p) {
  check_neurons("nested", p.batch, p.n_neurons);
  check_width("nested", p.d);
  if (p.n_levels < 1 || p.n_levels > kLevelsMax) {
    refuse("n_levels = " + std::to_string(p.n_levels), "1 to " + std::to_string(kLevelsMax));
  }
  for (int l = 0; l < p.n_levels; ++l) {
    const int bits = p.level[l].bits;
    if (bits >= 1 && bits <= kBitsMax) continue;
    refuse("bits[" + std::to_string(l) + "] = " + std::to_string(bits),
           "1 to " + std::to_string(kBitsMax));
  }
}

// The level from neuron `first` on.
NestedLevel from(const NestedLevel& level, int64_t d, int64_t first) {
  return {.codes = level.codes + first * 2 * chunks_of(d) * 16 * level.bits,
          .exponent = level.exponent + first * 2 * step_groups_of(d),
          .top = level.top + first * 2,
          .bits = level.bits};
}

void nested_on_cpu(const NestedParams& p) {
  const Loops& loop = loops();
  const int64_t x_bytes = p.d * (p.dtype == DType::kF32 ? 4 : 2);
  for (int64_t b = 0; b < p.batch; ++b) {
    p.scale[b] = loop.quantize(static_cast<const char*>(p.x) + b * x_bytes, p.equal, p.d, p.dtype,
                               p.q + b * q_width(p.d));
  }
  int64_t bytes = 0;
  for (int l = 0; l < p.n_levels; ++l) {
    bytes += p.n_neurons * 2 * chunks_of(p.d) * 16 * p.level[l].bits;
  }
  const int64_t n_blocks = (p.n_neurons + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(dynamic) if (bytes > kBytesAlone)
  for (int64_t block = 0; block < n_blocks; ++block) {
    const int64_t first = block * kBlock;
    const int64_t n = std::min(kBlock, p.n_neurons - first);
    for (int l = 0; l < p.n_levels; ++l) {
      loop.measure_level(from(p.level[l], p.d, first), n, p.d, p.q, p.batch, l > 0, p.y + 2 * first,
                         2 * p.n_neurons);
    }
  }
}

}  // namespace

void nested(const NestedParams& p, Device device, Stream stream) {
  check(p);
  if (p.batch == 0) return;
  device == Device::kCuda ? cuda::nested(p, stream) : nested_on_cpu(p);
}

}  // namespace csfast
