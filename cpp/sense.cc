#include "csfast/sense.h"

#include <algorithm>

#include "check.h"
#include "loops.h"
#include "share.h"

namespace csfast {
namespace {

void check(const SenseParams& p) {
  check_neurons("sense", p.batch, p.n_neurons);
  check_width("sense", p.d);
  check_code("sense", p.d, p.code);
}

void sense_on_cpu(const SenseParams& p) {
  const Loops& loop = loops();
  const int64_t neuron_bytes = 2 * row_bytes(p.d, p.code);
  const int64_t x_bytes = p.d * (p.dtype == DType::kF32 ? 4 : 2);
  for (int64_t b = 0; b < p.batch; ++b) {
    p.scale[b] = loop.quantize(static_cast<const char*>(p.x) + b * x_bytes, p.equal, p.d, p.dtype,
                               p.q + b * q_width(p.d));
  }
  const int64_t n_blocks = (p.n_neurons + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(dynamic) if (p.n_neurons * neuron_bytes > kBytesAlone)
  for (int64_t block = 0; block < n_blocks; ++block) {
    const int64_t first = block * kBlock;
    loop.measure(p.codes + first * neuron_bytes, 2 * std::min(kBlock, p.n_neurons - first), p.d,
                 p.code, p.q, p.batch, p.y + 2 * first, 2 * p.n_neurons);
  }
}

}  // namespace

void sense(const SenseParams& p, Device device, Stream stream) {
  check(p);
  if (p.batch == 0) return;
  device == Device::kCuda ? cuda::sense(p, stream) : sense_on_cpu(p);
}

}  // namespace csfast
