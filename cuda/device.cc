#include <cuda_runtime.h>

#include "csfast/types.h"

namespace csfast::cuda {

bool available() {
  int count = 0;
  const bool found = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
  if (!found) static_cast<void>(cudaGetLastError());  // or the next launch would report it
  return found;
}

}  // namespace csfast::cuda
