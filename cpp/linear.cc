#include "csfast/linear.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "loops.h"
#include "share.h"

namespace csfast {
namespace {

constexpr int64_t kBatchMax = 65535;  // as other operations have it
constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

[[noreturn]] void refuse(const std::string& given, const std::string& wanted) {
  throw std::invalid_argument("[linear] " + given + ": want " + wanted + ".");
}

void check(const LinearParams& p) {
  if (p.batch < 0 || p.batch > kBatchMax) {
    refuse("batch = " + std::to_string(p.batch), "0 to " + std::to_string(kBatchMax));
  }
  if (p.rows < 1 || p.rows > kInt32Max) refuse("rows = " + std::to_string(p.rows), "1 to 2^31 - 1");
  if (p.cols < 1 || p.cols > kInt32Max) refuse("cols = " + std::to_string(p.cols), "1 to 2^31 - 1");
  if (p.dtype == DType::kF16) refuse("w of float16", "float32 or bfloat16");
}

void linear_on_cpu(const LinearParams& p) {
  linear_prepare(p);
  const int64_t tiles = linear_tiles_of(p.rows);
  const int64_t bytes = p.rows * p.cols * (p.dtype == DType::kF32 ? 4 : 2);
#pragma omp parallel for schedule(static) if (bytes > kBytesAlone)
  for (int64_t tile = 0; tile < tiles; ++tile) linear_tiles(p, tile, tile + 1);
}

}  // namespace

void linear_prepare(const LinearParams& p) {
  const Loops& loop = loops();
  for (int64_t b = 0; b < p.batch; ++b) {
    loop.linear_input(p.x + b * p.cols, p.cols, p.dtype, p.work + b * linear_width(p.cols));
  }
}

void linear_tiles(const LinearParams& p, int64_t first, int64_t last) {
  const Loops& loop = loops();
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t row = tile * kLinearTile;
    for (int64_t b = 0; b < p.batch; b += kLinearBatch) {
      loop.linear(p, row, std::min(kLinearTile, p.rows - row), b,
                  std::min(kLinearBatch, p.batch - b));
    }
  }
}

void linear(const LinearParams& p, Device device, Stream stream) {
  check(p);
  if (p.batch == 0) return;
  device == Device::kCuda ? cuda::linear(p, stream) : linear_on_cpu(p);
}

}  // namespace csfast
