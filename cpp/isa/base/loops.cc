#include "loops.h"

namespace csfast::base {

constinit const Loops kLoops = as_loops("base");

}  // namespace csfast::base
