// Stands in for isa/avx512/ where the processor is not an x86-64.
#include "loops.h"

namespace csfast::avx512 {

const Loops* loops() {
  return nullptr;
}

}  // namespace csfast::avx512
