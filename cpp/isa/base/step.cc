// A step of a decoder between its products, in registers that every processor has.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa/base/activation.h"
#include "isa/base/number.h"
#include "loops.h"

namespace csfast::base {

#include "isa/step.inc"

}  // namespace csfast::base
