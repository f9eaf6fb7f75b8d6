#include "csfast/omp.h"

#include <nanobind/stl/string.h>

#include "call.h"

using namespace nb::literals;

namespace {

void omp(nb::handle gram, nb::handle correlation, nb::handle energy, nb::handle budget,
         int64_t budget_max, float tolerance, float residual_max, float correlation_min,
         float gain_min, int64_t per_step, int64_t group, nb::handle start, nb::handle start_count,
         nb::handle dictionary, bool coef, const char* design, nb::handle workspace,
         nb::handle index, nb::handle values, nb::handle count, nb::handle residual,
         nb::handle status, uintptr_t stream) {
  Call call("omp");
  Size batch{"batch"}, n{"n_atoms"}, width{"budget_max", budget_max}, grams{"n_dictionaries"};
  Size starts{"n_start"};
  csfast::OmpParams p{};
  p.correlation = call.in<float>(correlation, "correlation", {&batch, &n});
  if (dictionary.is_none()) {
    p.gram = call.in<float>(gram, "gram", {&n, &n});
    grams.value = 1;
  } else {
    p.gram = call.in<float>(gram, "gram", {&grams, &n, &n});
    p.dictionary = call.in<int32_t>(dictionary, "dictionary", {&batch});
  }
  p.energy = call.in<float>(energy, "energy", {&batch});
  p.budget = call.in<int32_t>(budget, "budget", {&batch});
  if (!start.is_none()) {
    p.start = call.in<int32_t>(start, "start", {&batch, &starts});
    p.n_start = starts;
    if (!start_count.is_none()) {
      p.start_count = call.in<int32_t>(start_count, "start_count", {&batch});
    }
  }
  p.index = call.out<int32_t>(index, "index", {&batch, &width});
  if (coef) p.coef = call.out<float>(values, "values", {&batch, &width});
  p.count = call.out<int32_t>(count, "count", {&batch});
  p.residual = call.out<float>(residual, "residual", {&batch});
  p.status = call.out<int32_t>(status, "status", {&batch});
  p.design = csfast::parse_omp_design(design);
  p.workspace = call.workspace(
      workspace, csfast::omp_workspace(batch, n, budget_max, p.design, call.device()));
  p.batch = batch;
  p.n_atoms = n;
  p.budget_max = budget_max;
  p.n_dictionaries = grams;
  p.per_step = per_step;
  p.group = group;
  p.tolerance = tolerance;
  p.residual_max = residual_max;
  p.correlation_min = correlation_min;
  p.gain_min = gain_min;
  unlocked([&] { csfast::omp(p, call.device(), stream_of(stream)); });
}

int64_t omp_workspace(int64_t batch, int64_t n_atoms, int64_t budget_max, const char* design,
                      bool cuda) {
  return csfast::omp_workspace(batch, n_atoms, budget_max, csfast::parse_omp_design(design),
                               cuda ? csfast::Device::kCuda : csfast::Device::kCpu);
}

std::string omp_plan(int64_t batch, int64_t n_atoms, int64_t budget_max, bool single,
                     int processors, int registers, int threads, int64_t shared_per_block,
                     int64_t shared_per_processor, const char* design) {
  return csfast::describe(
      csfast::choose_omp(batch, n_atoms, budget_max, single,
                         {processors, registers, threads, shared_per_block, shared_per_processor},
                         csfast::parse_omp_design(design)));
}

}  // namespace

void bind_omp(nb::module_& m) {
  m.def("omp", &omp, "gram"_a, "correlation"_a, "energy"_a, "budget"_a, "budget_max"_a,
        "tolerance"_a, "residual_max"_a, "correlation_min"_a, "gain_min"_a, "per_step"_a, "group"_a,
        "start"_a.none(), "start_count"_a.none(), "dictionary"_a.none(), "coef"_a, "design"_a,
        "workspace"_a, "index"_a, "values"_a, "count"_a, "residual"_a, "status"_a, "stream"_a,
        nb::sig("def omp(gram: torch.Tensor, correlation: torch.Tensor, energy: torch.Tensor, "
                "budget: torch.Tensor, budget_max: int, tolerance: float, residual_max: float, "
                "correlation_min: float, gain_min: float, per_step: int, group: int, "
                "start: torch.Tensor | None, start_count: torch.Tensor | None, "
                "dictionary: torch.Tensor | None, coef: bool, design: str, "
                "workspace: torch.Tensor, index: torch.Tensor, values: torch.Tensor, "
                "count: torch.Tensor, residual: torch.Tensor, status: torch.Tensor, "
                "stream: int) -> None"));
  m.def("omp_workspace", &omp_workspace, "batch"_a, "n_atoms"_a, "budget_max"_a, "design"_a,
        "cuda"_a);
  m.def("omp_plan", &omp_plan, "batch"_a, "n_atoms"_a, "budget_max"_a, "single"_a, "processors"_a,
        "registers"_a, "threads"_a, "shared_per_block"_a, "shared_per_processor"_a, "design"_a);
}
