#include "csfast/execute.h"

#include <algorithm>
#include <cmath>

#include "base/number.h"
#include "loops.h"

namespace csfast::base {
namespace {

constexpr int kLanes = 16;  // independent sums: enough to fill the vector units of any baseline

template <typename T>
float dot(const T* w, const T* x, int64_t d) {
  float lane[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) {
    for (int i = 0; i < kLanes; ++i) lane[i] += to_float(w[c + i]) * to_float(x[c + i]);
  }
  for (int i = 0; c + i < d; ++i) lane[i] += to_float(w[c + i]) * to_float(x[c + i]);
  float total = 0.0f;
  for (const float v : lane) total += v;
  return total;
}

}  // namespace

void gather(const ExecuteParams& p, const void* x, const int32_t* neuron, int64_t n, bool first,
            float* sum) noexcept {
  if (first) std::fill(sum, sum + p.d, 0.0f);
  dispatch(p.dtype, [&]<typename T>() {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = neuron[i] * p.d;
      const float g = dot(static_cast<const T*>(p.gate) + at, static_cast<const T*>(x), p.d);
      const float u = dot(static_cast<const T*>(p.up) + at, static_cast<const T*>(x), p.d);
      const float a = g / (1.0f + std::exp(-g)) * u;
      const T* down = static_cast<const T*>(p.down_t) + at;
      for (int64_t c = 0; c < p.d; ++c) sum[c] += a * to_float(down[c]);
    }
  });
}

void finish(const float* sums, int64_t n_segments, int64_t d, DType dtype, void* out) noexcept {
  dispatch(dtype, [&]<typename T>() {
    for (int64_t c = 0; c < d; ++c) {
      float total = 0.0f;
      for (int64_t s = 0; s < n_segments; ++s) total += sums[s * d + c];
      static_cast<T*>(out)[c] = from_float<T>(total);
    }
  });
}

}  // namespace csfast::base
