// A step of a decoder between its products, in registers of AVX-512.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa/base/activation.h"
#include "isa/base/number.h"
#include "loops.h"

namespace csfast::avx512 {

#include "isa/step.inc"

}  // namespace csfast::avx512
