// No AVX-512 in this file: it runs on every processor.
#include "loops.h"

namespace csfast::avx512 {

const Loops* loops() {
  static constexpr Loops kLoops = as_loops("avx512");
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
                    __builtin_cpu_supports("bmi2");
  return runs ? &kLoops : nullptr;
}

}  // namespace csfast::avx512
