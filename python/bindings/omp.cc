#include "csfast/omp.h"

#include "call.h"

using namespace nb::literals;

namespace {

void omp(nb::handle gram, nb::handle correlation, nb::handle energy, nb::handle budget,
         int64_t budget_max, float tolerance, nb::handle workspace, nb::handle index,
         nb::handle coef, nb::handle count, nb::handle residual, nb::handle status,
         uintptr_t stream) {
  Call call("omp");
  Size batch{"batch"}, n{"n_atoms"}, width{"budget_max", budget_max};
  csfast::OmpParams p{};
  p.correlation = call.in<float>(correlation, "correlation", {&batch, &n});
  p.gram = call.in<float>(gram, "gram", {&n, &n});
  p.energy = call.in<float>(energy, "energy", {&batch});
  p.budget = call.in<int32_t>(budget, "budget", {&batch});
  p.index = call.out<int32_t>(index, "index", {&batch, &width});
  p.coef = call.out<float>(coef, "coef", {&batch, &width});
  p.count = call.out<int32_t>(count, "count", {&batch});
  p.residual = call.out<float>(residual, "residual", {&batch});
  p.status = call.out<int32_t>(status, "status", {&batch});
  p.workspace =
      call.workspace(workspace, csfast::omp_workspace(batch, n, budget_max, call.device()));
  p.batch = batch;
  p.n_atoms = n;
  p.budget_max = budget_max;
  p.tolerance = tolerance;
  unlocked([&] { csfast::omp(p, call.device(), stream_of(stream)); });
}

int64_t omp_workspace(int64_t batch, int64_t n_atoms, int64_t budget_max, bool cuda) {
  return csfast::omp_workspace(batch, n_atoms, budget_max,
                               cuda ? csfast::Device::kCuda : csfast::Device::kCpu);
}

}  // namespace

void bind_omp(nb::module_& m) {
  m.def("omp", &omp, "gram"_a, "correlation"_a, "energy"_a, "budget"_a, "budget_max"_a,
        "tolerance"_a, "workspace"_a, "index"_a, "coef"_a, "count"_a, "residual"_a, "status"_a,
        "stream"_a,
        nb::sig("def omp(gram: torch.Tensor, correlation: torch.Tensor, energy: torch.Tensor, "
                "budget: torch.Tensor, budget_max: int, tolerance: float, "
                "workspace: torch.Tensor, index: torch.Tensor, coef: torch.Tensor, "
                "count: torch.Tensor, residual: torch.Tensor, status: torch.Tensor, "
                "stream: int) -> None"));
  m.def("omp_workspace", &omp_workspace, "batch"_a, "n_atoms"_a, "budget_max"_a, "cuda"_a);
}
