// What is the same on every machine, for the host and for kernels.
#pragma once

namespace csfast::cuda {

inline constexpr int kWarp = 32;  // lanes

}  // namespace csfast::cuda
