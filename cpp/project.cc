#include "csfast/project.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "check.h"
#include "loops.h"
#include "share.h"

namespace csfast {
namespace {

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();
constexpr int64_t kRowsAtOnce = 16;  // of phi, a thread: 128 KB at d = 4096 and 16 bits

[[noreturn]] void refuse(const std::string& given, const std::string& wanted) {
  throw std::invalid_argument("[project] " + given + ": want " + wanted + ".");
}

void check(const ProjectParams& p) {
  check_width("project", p.d);
  if (p.m < 1 || p.m > kInt32Max) refuse("m = " + std::to_string(p.m), "1 to 2^31 - 1");
  if (p.rows < 1 || p.rows > p.m) {
    refuse("rows = " + std::to_string(p.rows), "1 to m = " + std::to_string(p.m));
  }
  if (p.batch < 0 || p.batch > kInt32Max / p.rows) {
    refuse("batch = " + std::to_string(p.batch) + " rows of " + std::to_string(p.rows) +
               " measurements",
           "fewer than 2^31 in all");
  }
}

void project_on_cpu(const ProjectParams& p) {
  const Loops& loop = loops();
  const int64_t n_blocks = (p.rows + kRowsAtOnce - 1) / kRowsAtOnce;
  const int64_t bytes = p.rows * p.d * (p.dtype == DType::kF32 ? 4 : 2);
#pragma omp parallel for schedule(dynamic) if (bytes > kBytesAlone)
  for (int64_t block = 0; block < n_blocks; ++block) {
    const int64_t first = block * kRowsAtOnce;
    loop.project(p, first, std::min(kRowsAtOnce, p.rows - first));
  }
}

}  // namespace

void project(const ProjectParams& p, Device device, Stream stream) {
  check(p);
  if (p.batch == 0) return;
  device == Device::kCuda ? cuda::project(p, stream) : project_on_cpu(p);
}

}  // namespace csfast
