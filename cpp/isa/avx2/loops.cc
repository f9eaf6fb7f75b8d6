// No AVX2 in this file: it runs on every processor.
#include "loops.h"

namespace csfast::avx2 {

const Loops* loops() {
  static constexpr Loops kLoops = as_loops("avx2");
  const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  return runs ? &kLoops : nullptr;
}

}  // namespace csfast::avx2
