#include "csfast/project.h"

#include "isa/base/dot.h"
#include "isa/base/number.h"
#include "loops.h"

namespace csfast::base {

void project(const ProjectParams& p, int64_t first, int64_t n) noexcept {
  dispatch(p.dtype, [&]<typename T>() {
    for (int64_t i = first; i < first + n; ++i) {
      const T* phi = static_cast<const T*>(p.phi) + i * p.d;
      for (int64_t b = 0; b < p.batch; ++b) {
        p.y[b * p.rows + i] = dot(phi, static_cast<const T*>(p.x) + b * p.d, p.d);
      }
    }
  });
}

}  // namespace csfast::base
