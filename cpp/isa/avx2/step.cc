// A step of a decoder between its products, in registers of AVX2.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa/base/activation.h"
#include "isa/base/number.h"
#include "loops.h"

namespace csfast::avx2 {

#include "isa/step.inc"

}  // namespace csfast::avx2
