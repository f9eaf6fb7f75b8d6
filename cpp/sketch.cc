#include "csfast/sketch.h"

#include <bit>
#include <stdexcept>
#include <string>

#include "loops.h"
#include "share.h"

namespace csfast {
namespace {

// Rows of the batch that a thread keeps the sums of.
constexpr int64_t kRowsAtOnce = 16;

[[noreturn]] void refuse(const std::string& given, const std::string& wanted) {
  throw std::invalid_argument("[sketch] " + given + ": want " + wanted + ".");
}

void check(const SketchParams& p) {
  if (p.batch < 0 || p.batch > kSketchBatchMax) {
    refuse("batch = " + std::to_string(p.batch), "0 to " + std::to_string(kSketchBatchMax));
  }
  if (p.rows < 1) refuse("rows = " + std::to_string(p.rows), "at least 1");
  if (p.cols < 1 || p.cols > kSketchColsMax) {
    refuse("cols = " + std::to_string(p.cols), "1 to " + std::to_string(kSketchColsMax));
  }
  if (p.n_levels < 1 || p.n_levels > kSketchLevelsMax) {
    refuse("n_levels = " + std::to_string(p.n_levels), "1 to " + std::to_string(kSketchLevelsMax));
  }
  for (int l = 0; l < p.n_levels; ++l) {
    const int bits = p.level[l].bits;
    if (bits >= 1 && bits <= kTrellisBitsMax) continue;
    refuse("bits[" + std::to_string(l) + "] = " + std::to_string(bits),
           "1 to " + std::to_string(kTrellisBitsMax));
  }
}

float to_float(uint16_t bfloat16) {
  return std::bit_cast<float>(uint32_t{bfloat16} << 16);
}

// Of one row tile, for `batch` rows from b on.
void multiply_tile(const SketchParams& p, int64_t tile, int64_t b, int64_t batch) {
  const Loops& loop = loops();
  int32_t sum[kRowsAtOnce * kTrellisRows];
  float y[kRowsAtOnce * kTrellisRows];
  const int64_t first = tile * kTrellisRows;
  const int64_t n = p.rows - first < kTrellisRows ? p.rows - first : kTrellisRows;
  for (int l = 0; l < p.n_levels; ++l) {
    const SketchLevel& level = p.level[l];
    const int64_t bytes = trellis_col_tiles(p.cols) * level.bits * kTileBytes;
    const uint8_t* codes = level.codes + tile * bytes;
    const uint8_t* before[2] = {tile > 0 ? codes - bytes : nullptr,
                                tile > 1 ? codes - 2 * bytes : nullptr};
    loop.multiply(codes, before, p.cols, level.bits, p.q + b * sketch_width(p.cols), batch, sum);
    for (int64_t i = 0; i < batch; ++i) {
      for (int64_t r = 0; r < n; ++r) {
        const int64_t at = i * kTrellisRows + r;
        const float part = static_cast<float>(sum[at]) * to_float(level.step[first + r]);
        y[at] = l > 0 ? y[at] + part : part;
      }
    }
  }
  for (int64_t i = 0; i < batch; ++i) {
    float* to = p.y + (b + i) * p.rows + first;
    for (int64_t r = 0; r < n; ++r) to[r] = y[i * kTrellisRows + r] * p.scale[b + i];
  }
}

void sketch_on_cpu(const SketchParams& p) {
  sketch_prepare(p);
  const int64_t tiles = trellis_row_tiles(p.rows);
  int64_t bytes = 0;
  for (int l = 0; l < p.n_levels; ++l) {
    bytes += tiles * trellis_col_tiles(p.cols) * p.level[l].bits * kTileBytes;
  }
#pragma omp parallel for schedule(static) if (bytes > kBytesAlone)
  for (int64_t tile = 0; tile < tiles; ++tile) sketch_tiles(p, tile, tile + 1);
}

}  // namespace

void sketch_prepare(const SketchParams& p) {
  const Loops& loop = loops();
  const int64_t x_bytes = p.cols * (p.dtype == DType::kF32 ? 4 : 2);
  for (int64_t b = 0; b < p.batch; ++b) {
    p.scale[b] = loop.rotate(static_cast<const char*>(p.x) + b * x_bytes, p.turn, p.cols, p.dtype,
                             p.z + b * p.cols, p.q + b * sketch_width(p.cols));
  }
}

void sketch_tiles(const SketchParams& p, int64_t first, int64_t last) {
  for (int64_t tile = first; tile < last; ++tile) {
    for (int64_t b = 0; b < p.batch; b += kRowsAtOnce) {
      multiply_tile(p, tile, b, p.batch - b < kRowsAtOnce ? p.batch - b : kRowsAtOnce);
    }
  }
}

void sketch(const SketchParams& p, Device device, Stream stream) {
  check(p);
  if (p.batch == 0) return;
  device == Device::kCuda ? cuda::sketch(p, stream) : sketch_on_cpu(p);
}

}  // namespace csfast
