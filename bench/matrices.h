// What bench_sketch times: single matrices and all of a model, by their codes or as they are.
#pragma once

#include <cstdint>
#include <iterator>
#include <string_view>

#include "csfast/sketch.h"

namespace csfast::bench {

struct Shape {
  int64_t rows, cols;
};

struct Matrix {
  const char* name;  // in the results
  int64_t rows, cols;
  std::string_view bits;  // such as "3+3"
  int64_t batch;
};

inline constexpr int kPassParts = 5;  // the maps of a layer, and the head

struct Pass {
  const char* name;
  std::string_view bits[kPassParts];
  int64_t batch;
};

#include "matrices.inc"

static_assert(std::size(kPassShapes) == kPassParts);

// Of "3+3": its levels and the bits of each.
constexpr int n_levels_of(std::string_view bits) {
  return static_cast<int>((bits.size() + 1) / 2);
}
constexpr int bits_of(std::string_view bits, int level) {
  return bits[2 * level] - '0';
}

// Bytes of the weights or codes of a matrix that a call reads.
constexpr int64_t matrix_bytes(const Shape& s, std::string_view bits) {
  if (bits.empty()) return s.rows * s.cols * 2;
  int64_t bytes = 0;
  for (int l = 0; l < n_levels_of(bits); ++l) {
    bytes += trellis_row_tiles(s.rows) * trellis_col_tiles(s.cols) * kTileBytes * bits_of(bits, l);
  }
  return bytes;
}

}  // namespace csfast::bench
