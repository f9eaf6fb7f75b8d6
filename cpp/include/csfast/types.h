// What every operation of csfast speaks: element types, devices, streams, errors.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace csfast {

enum class DType : uint8_t { kF32, kF16, kBF16 };
enum class Device : uint8_t { kCpu, kCuda };

// What a gate goes through: z / (1 + exp(-z)), or 0.5 z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))).
enum class Activation : uint8_t { kSilu, kGeluTanh };

// A cudaStream_t, without making every file that passes one include CUDA. Null on the CPU.
using Stream = void*;

// The backend is missing, or it failed. Wrong arguments are std::invalid_argument instead.
struct BackendError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a model makes of its input is not a number.
struct NotFiniteError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

namespace cuda {
bool available();
}

}  // namespace csfast
