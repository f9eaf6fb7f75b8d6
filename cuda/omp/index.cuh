// An index that is known only at run time, for what has none at run time: registers.
#pragma once

namespace csfast::cuda {

// Calls f.operator()<i>() for the i in [kLow, kHigh) that is asked for. A few branches are fewer
// instructions than all cases with conditions.
template <int kLow, int kHigh, typename F>
__device__ __forceinline__ void at_index(int i, F&& f) {
  if constexpr (kHigh - kLow == 1) {
    f.template operator()<kLow>();
  } else if constexpr (kHigh > kLow) {
    constexpr int kMiddle = (kLow + kHigh) / 2;
    if (i < kMiddle) {
      at_index<kLow, kMiddle>(i, f);
    } else {
      at_index<kMiddle, kHigh>(i, f);
    }
  }
}

}  // namespace csfast::cuda
