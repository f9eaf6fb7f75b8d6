// From values that are known at run time to types and constants that kernels are compiled for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <string>

#include "csfast/types.h"

namespace csfast::cuda {

// Calls f.operator()<T>() with the C++ type that `dtype` names.
template <typename F>
void dispatch(DType dtype, const char* op, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f.template operator()<float>();
    case DType::kF16:
      return f.template operator()<__half>();
    case DType::kBF16:
      return f.template operator()<__nv_bfloat16>();
  }
  throw BackendError(std::string("[") + op + "] unknown dtype.");
}

// Calls f.operator()<kBits>() with the number of bits as a constant.
template <typename F>
void dispatch_bits(int bits, const char* op, F&& f) {
  switch (bits) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
  }
  throw BackendError(std::string("[") + op + "] bits = " + std::to_string(bits) +
                     ": want 1, 2, 3 or 4.");
}

}  // namespace csfast::cuda
