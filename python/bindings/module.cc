#include <nanobind/nanobind.h>

#include "csfast/isa.h"
#include "csfast/types.h"

namespace nb = nanobind;

#include "declarations.inc"  // of bind_<op> for every operation, from CMakeLists.txt

void bind_engine(nb::module_& m);
void bind_session(nb::module_& m);

NB_MODULE(_native, m) {
  m.doc() = "The compiled half of csfast. Private: csfast.ops is its only importer.";
  nb::exception<csfast::BackendError>(m, "BackendError", PyExc_RuntimeError);
  nb::exception<csfast::NotFiniteError>(m, "NotFiniteError", PyExc_ArithmeticError);
  m.def("cuda_available", &csfast::cuda::available);
  m.def("isa", &csfast::isa);
#include "calls.inc"  // of each
  bind_engine(m);
  bind_session(m);
}
