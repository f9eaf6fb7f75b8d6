// Stands in for isa/avx2/ where the processor is not an x86-64.
#include "loops.h"

namespace csfast::avx2 {

const Loops* loops() {
  return nullptr;
}

}  // namespace csfast::avx2
