#include <nanobind/nanobind.h>

#include "csfast/isa.h"
#include "csfast/types.h"

namespace nb = nanobind;

void bind_sense(nb::module_& m);
void bind_nested(nb::module_& m);
void bind_recover(nb::module_& m);
void bind_tile(nb::module_& m);
void bind_omp(nb::module_& m);
void bind_project(nb::module_& m);
void bind_read(nb::module_& m);
void bind_execute(nb::module_& m);
void bind_select(nb::module_& m);
void bind_ffn(nb::module_& m);
void bind_session(nb::module_& m);

NB_MODULE(_native, m) {
  m.doc() = "The compiled half of csfast. Private: csfast.ops is its only importer.";
  nb::exception<csfast::BackendError>(m, "BackendError", PyExc_RuntimeError);
  m.def("cuda_available", &csfast::cuda::available);
  m.def("isa", &csfast::isa);
  bind_sense(m);
  bind_nested(m);
  bind_recover(m);
  bind_tile(m);
  bind_omp(m);
  bind_project(m);
  bind_read(m);
  bind_execute(m);
  bind_select(m);
  bind_ffn(m);
  bind_session(m);
}
