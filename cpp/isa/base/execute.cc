#include "csfast/execute.h"

#include <algorithm>

#include "isa/base/activation.h"
#include "isa/base/dot.h"
#include "isa/base/number.h"
#include "loops.h"

namespace csfast::base {
void gather(const ExecuteParams& p, const Rows& rows, const int32_t* neuron, int64_t n,
            int64_t /*n_ahead*/, bool first) noexcept {
  dispatch(p.form.dtype, [&]<typename T>() {
    const auto bias = [](const void* of, int64_t j, float v) {
      return of == nullptr ? v : v + to_float(static_cast<const T*>(of)[j]);
    };
    for (int64_t r = 0; first && r < rows.n; ++r) {
      std::fill_n(rows.sum + r * rows.sum_stride, p.form.d, 0.0f);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = neuron[i] * p.form.d;
      const T* down = static_cast<const T*>(p.weights.down_t) + at;
      for (int64_t r = 0; r < rows.n; ++r) {  // the others find the weights in the cache
        const T* x = static_cast<const T*>(rows.x) + r * p.form.d;
        float* sum = rows.sum + r * rows.sum_stride;
        const float g = bias(p.weights.gate_bias, neuron[i],
                             dot(static_cast<const T*>(p.weights.gate) + at, x, p.form.d));
        const float u = bias(p.weights.up_bias, neuron[i],
                             dot(static_cast<const T*>(p.weights.up) + at, x, p.form.d));
        const float a = activate(p.form.activation, g) * u;
        for (int64_t c = 0; c < p.form.d; ++c) sum[c] += a * to_float(down[c]);
      }
    }
  });
}

void finish(const float* sums, int64_t n_segments, int64_t d, DType dtype, const void* bias,
            void* out) noexcept {
  dispatch(dtype, [&]<typename T>() {
    for (int64_t c = 0; c < d; ++c) {
      float total = 0.0f;
      for (int64_t s = 0; s < n_segments; ++s) total += sums[s * d + c];
      if (bias != nullptr) total += to_float(static_cast<const T*>(bias)[c]);
      static_cast<T*>(out)[c] = from_float<T>(total);
    }
  });
}

}  // namespace csfast::base
