// Omp on CUDA: the whole pursuit in one launch. choose_omp() says by which kernel.
#include <vector>

#include "common/device.cuh"
#include "common/launch.cuh"
#include "csfast/omp.h"
#include "omp/chip.cuh"
#include "omp/general.cuh"
#include "omp/quad.cuh"

namespace csfast::cuda {
namespace {

const OmpDevice& omp_device() {
  static const std::vector<OmpDevice> devices = of_devices<OmpDevice>("omp", [](auto ask) {
    return OmpDevice{.processors = ask(cudaDevAttrMultiProcessorCount),
                     .registers = ask(cudaDevAttrMaxRegistersPerMultiprocessor),
                     .threads = ask(cudaDevAttrMaxThreadsPerMultiProcessor),
                     .shared_per_block = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                     .shared_per_processor = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  });
  return devices[static_cast<size_t>(current_device("omp"))];
}

// Calls f.operator()<v>() with v as a constant.
template <typename F>
void dispatch_bool(bool v, F&& f) {
  v ? f.template operator()<true>() : f.template operator()<false>();
}

}  // namespace

int64_t omp_workspace(int64_t batch, int64_t n_atoms, int64_t budget_max, OmpKernel design) {
  // Where kQuad may be chosen, it wants none: what is chosen where it may not be decides.
  return choose_omp(batch, n_atoms, budget_max, false, omp_device(), design).workspace;
}

void omp(const OmpParams& p, Stream stream) {
  const bool aligned = p.n_atoms % 4 == 0 && is_aligned(p.gram) && is_aligned(p.correlation);
  const bool single = p.per_step == 1 && p.group == 1;
  const OmpPlan plan =
      choose_omp(p.batch, p.n_atoms, p.budget_max, single && aligned, omp_device(), p.design);
  if (plan.kernel == OmpKernel::kQuad) {
    want_aligned(p.gram, 16, "omp", "gram");
    want_aligned(p.correlation, 16, "omp", "correlation");
  }
  const OmpJob job{p, plan, OmpChipLayout(plan, p.budget_max), aligned};
  const auto run = [&](const char* name, void (*kernel)(OmpJob)) {
    launch("omp", name, kernel, dim3(static_cast<unsigned>(plan.blocks)),
           dim3(static_cast<unsigned>(plan.threads)), stream, job,
           {.shared_bytes = static_cast<int>(plan.shared)});
  };
  dispatch_bool(single, [&]<bool kOne>() {
    dispatch_bool(plan.rows_spilled > 0, [&]<bool kSpills>() {
      switch (plan.kernel) {
        case OmpKernel::kAuto:  // which no plan is
        case OmpKernel::kGeneral:
          return run("omp_general", omp_general_kernel);
        case OmpKernel::kFlat:
          return run("omp_flat", omp_flat_kernel<kOne>);
        case OmpKernel::kDeep:
          return run("omp_deep", omp_deep_kernel<kOne, kSpills>);
        case OmpKernel::kWide:
          return run("omp_wide", omp_wide_kernel<kOne, kSpills>);
        case OmpKernel::kQuad:
          return run("omp_quad", omp_quad_kernel);
      }
    });
  });
}

}  // namespace csfast::cuda
