// From values that are known at run time to types and constants that kernels are compiled for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <string>

#include "csfast/planes.h"
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

// Calls f.operator()<kCode>() with the code as a constant.
template <typename F>
void dispatch_code(Code code, const char* op, F&& f) {
  switch (code) {
    case Code::kBits1:
      return f.template operator()<Code::kBits1>();
    case Code::kBits2:
      return f.template operator()<Code::kBits2>();
    case Code::kBits3:
      return f.template operator()<Code::kBits3>();
    case Code::kBits4:
      return f.template operator()<Code::kBits4>();
    case Code::kTernary:
      return f.template operator()<Code::kTernary>();
  }
  throw BackendError(std::string("[") + op + "] unknown code.");
}

}  // namespace csfast::cuda
