#include "csfast/encode.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "loops.h"

namespace csfast {
namespace {

constexpr int64_t kColumns = 64;  // whose errors are spread over the rest at once

[[noreturn]] void refuse(const std::string& given, const std::string& wanted) {
  throw std::invalid_argument("[encode] " + given + ": want " + wanted + ".");
}

void check(const EncodeParams& p) {
  check_width("encode", p.cols);
  if (p.rows < 1) refuse("rows = " + std::to_string(p.rows), "at least 1");
  if (p.bits < 1 || p.bits > kTrellisBitsMax) {
    refuse("bits = " + std::to_string(p.bits), "1 to " + std::to_string(kTrellisBitsMax));
  }
  if (p.nu < kTrellisMemoryMin || p.nu > kTrellisMemoryMax) {
    refuse("nu = " + std::to_string(p.nu),
           std::to_string(kTrellisMemoryMin) + " to " + std::to_string(kTrellisMemoryMax));
  }
}

// The codes of one column of a matrix, from the index and u of every row.
void pack(const EncodeParams& p, int64_t col, const uint8_t* index, const uint8_t* u) {
  const int64_t across = trellis_col_tiles(p.cols);
  for (int64_t row = 0; row < p.rows; ++row) {
    const int place = place_of(row, col);
    const int64_t tile_at = row / kTrellisRows * across + col / kTrellisCols;
    uint8_t* tile = p.codes + tile_at * p.bits * kTileBytes + byte_of(row, col);
    const int raw = index[row] >> 2;
    tile[0] |= static_cast<uint8_t>(u[row] << place);
    if (p.bits == 2) tile[kTileBytes] |= static_cast<uint8_t>(raw << raw_bit_of(place));
    if (p.bits >= 3) {
      tile[(1 + place / 4) * kTileBytes] |= static_cast<uint8_t>((raw & 3) << 2 * (place % 4));
    }
    if (p.bits == 4) tile[3 * kTileBytes] |= static_cast<uint8_t>(raw >> 2 << place);
  }
}

void encode_on_cpu(const EncodeParams& p) {
  float* left = static_cast<float*>(p.workspace);  // (rows, cols)
  const Loops& loop = loops();
  const int64_t steps = (p.rows + kLanes - 1) / kLanes;
  const int64_t padded = steps * kLanes;
  const Trellis trellis(p.table, p.bits, p.nu);
  std::memset(p.codes, 0,
              trellis_row_tiles(p.rows) * trellis_col_tiles(p.cols) * p.bits * kTileBytes);
  std::memcpy(left, p.w, p.rows * p.cols * sizeof(float));
  const float largest = *std::max_element(p.step, p.step + p.rows);
  std::vector<float> inverse(padded), weight(padded), target(padded);
  for (int64_t r = 0; r < p.rows; ++r) {
    if (p.step[r] <= 0) continue;  // stands for zeros, whatever its codes
    inverse[r] = 1 / p.step[r];
    const float part = p.step[r] / largest;
    weight[r] = part * part;
  }
  std::vector<float> part(kColumns * p.rows), error(kColumns * p.rows);
  std::vector<uint8_t> index(padded), u(padded);
  TrellisWork work(trellis, steps);
  for (int64_t first = 0; first < p.cols; first += kColumns) {
    const int64_t n = std::min(kColumns, p.cols - first);
    for (int64_t r = 0; r < p.rows; ++r) {
      for (int64_t c = 0; c < n; ++c) part[c * p.rows + r] = left[r * p.cols + first + c];
    }
    for (int64_t c = 0; c < n; ++c) {
      const float* column = &part[c * p.rows];
      const float* spread = p.feedback + (first + c) * p.cols + first;
      for (int64_t r = 0; r < p.rows; ++r) target[r] = column[r] * inverse[r];
      loop.trellis(trellis, target.data(), weight.data(), steps, work, index.data(), u.data());
      pack(p, first + c, index.data(), u.data());
      const float scale = 1 / spread[c];
      float* wrong = &error[c * p.rows];
      for (int64_t r = 0; r < p.rows; ++r) {
        const int8_t value = p.table[index[r]];
        p.value[r * p.cols + first + c] = value;
        wrong[r] = (column[r] - p.step[r] * value) * scale;
      }
      for (int64_t j = c + 1; j < n; ++j) {
        loop.subtract_scaled(wrong, spread[j], p.rows, &part[j * p.rows]);
      }
    }
    const int64_t rest = first + n;
    if (rest == p.cols) break;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < p.rows; ++r) {
      for (int64_t c = 0; c < n; ++c) {
        loop.subtract_scaled(p.feedback + (first + c) * p.cols + rest, error[c * p.rows + r],
                             p.cols - rest, left + r * p.cols + rest);
      }
    }
  }
}

}  // namespace

Trellis::Trellis(const int8_t* table, int bits, int nu) : bits(bits), nu(nu) {
  for (int i = 0; i < 2 << bits; ++i) level[i] = table[i];
  for (uint32_t window = 0; window < 2u << nu; ++window) {
    subset[window] = static_cast<uint8_t>(subset_of(window, polynomials_of(nu)));
  }
}

TrellisWork::TrellisWork(const Trellis& trellis, int64_t steps)
    : cost(2 * kLanes << trellis.nu), older(steps << trellis.nu), best(steps * 4 * kLanes) {}

int64_t encode_workspace(int64_t rows, int64_t cols, Device device) {
  if (device == Device::kCuda) return cuda::encode_workspace(rows, cols);
  return rows * cols * static_cast<int64_t>(sizeof(float));
}

void encode(const EncodeParams& p, Device device, Stream stream) {
  check(p);
  device == Device::kCuda ? cuda::encode(p, stream) : encode_on_cpu(p);
}

}  // namespace csfast
