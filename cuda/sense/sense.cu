// Sense on CUDA: quantise the activation, then one warp per two neurons.
//
// Reads the codes once, n_neurons * 2 * row_bytes, which bounds it; sixteen integer products of
// four bytes go to every 16 bytes of 2-bit codes, and twenty to those of ternary ones, whose digits
// take five operations for each product. The activation stays in the L1 cache.
#include "common/dispatch.cuh"
#include "common/launch.cuh"
#include "common/quantize.cuh"
#include "csfast/sense.h"
#include "sense/measure.cuh"

namespace csfast::cuda {
namespace {

template <Code kCode>
__global__ void __launch_bounds__(kMeasureWarps* kWarp) sense_kernel(const SenseParams p) {
  int2* y = reinterpret_cast<int2*>(p.y);  // (batch, n_neurons): gate, up
  measure_neurons<kCode>(p.codes, p.q, p.batch, p.d, p.n_neurons,
                         [&](int64_t b, int64_t j, int y_gate, int y_up) {
                           y[b * p.n_neurons + j] = make_int2(y_gate, y_up);
                         });
}

}  // namespace

void sense(const SenseParams& p, Stream stream) {
  want_aligned(p.codes, 16, "sense", "codes");
  want_aligned(p.q, 16, "sense", "q");
  want_aligned(p.y, 8, "sense", "y");
  dispatch(p.dtype, "sense", [&]<typename T>() {
    quantize<T>("sense", {.equal = p.equal, .x = p.x, .q = p.q, .scale = p.scale, .d = p.d},
                p.batch, stream);
  });
  dispatch_code(p.code, "sense", [&]<Code kCode>() {
    launch("sense", "sense", sense_kernel<kCode>,
           dim3(blocks_of(p.n_neurons, kMeasureWarps * kMeasureNeurons)),
           dim3(kMeasureWarps * kWarp), stream, p);
  });
}

}  // namespace csfast::cuda
