#include "csfast/project.h"

#include "call.h"

using namespace nb::literals;

namespace {

void project(nb::handle phi, nb::handle x, int64_t rows, nb::handle y, uintptr_t stream) {
  Call call("project");
  Size batch{"batch"}, d{"d"}, m{"m"}, wanted{"rows", rows};
  csfast::ProjectParams p{};
  p.phi = call.in_type(phi, "phi", {&m, &d});
  p.x = call.in_type(x, "x", {&batch, &d});
  p.y = call.out<float>(y, "y", {&batch, &wanted});
  p.batch = batch;
  p.d = d;
  p.m = m;
  p.rows = rows;
  p.dtype = call.dtype();
  unlocked([&] { csfast::project(p, call.device(), stream_of(stream)); });
}

}  // namespace

void bind_project(nb::module_& m) {
  m.def("project", &project, "phi"_a, "x"_a, "rows"_a, "y"_a, "stream"_a,
        nb::sig("def project(phi: torch.Tensor, x: torch.Tensor, rows: int, y: torch.Tensor, "
                "stream: int) -> None"));
}
