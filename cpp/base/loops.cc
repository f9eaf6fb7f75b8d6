#include "loops.h"

namespace csfast::base {

constinit const Loops kLoops{.name = "base",
                             .quantize = quantize,
                             .measure = measure,
                             .measure_level = measure_level,
                             .project = project,
                             .usage = usage,
                             .keep = keep,
                             .gather = gather,
                             .subtract = subtract,
                             .finish = finish};

}  // namespace csfast::base
