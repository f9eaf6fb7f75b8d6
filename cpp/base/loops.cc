#include "loops.h"

namespace csfast::base {

constinit const Loops kLoops{.name = "base",
                             .quantize = quantize,
                             .measure = measure,
                             .project = project,
                             .keep = keep,
                             .gather = gather,
                             .finish = finish};

}  // namespace csfast::base
