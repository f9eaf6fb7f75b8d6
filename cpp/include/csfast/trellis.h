// Trellis codes: their polynomials and their layout, as python/csfast/codes/trellis.py tells them.
#pragma once

#include <cstdint>

namespace csfast {

inline constexpr int kTrellisBitsMax = 4;
inline constexpr int kTrellisMemoryMin = 3;
inline constexpr int kTrellisMemoryMax = 8;  // and that of a sketch
inline constexpr int kLanes = 16;            // rows side by side, each in a sequence of its own
inline constexpr int kLaneSteps = 4;         // of a sequence in one byte, which has two
inline constexpr int kTrellisRows = kLanes * kLaneSteps;      // of a tile
inline constexpr int kTrellisCols = 8;                        // of a tile
inline constexpr int kTileBytes = kLanes * kTrellisCols / 2;  // for each bit of a weight

// What one bit of every input counts to the second and the first bit of the subset: bit i is that
// of i steps ago. By memory.
struct Polynomials {
  uint32_t h0, h1;
};

constexpr Polynomials polynomials_of(int nu) {
  constexpr Polynomials kOf[kTrellisMemoryMax - kTrellisMemoryMin + 1] = {
      {013, 04}, {023, 04}, {045, 010}, {0103, 024}, {0235, 0126}, {0515, 0362},
  };
  return kOf[nu - kTrellisMemoryMin];
}

constexpr uint32_t parity_of(uint32_t x) {
  for (int shift = 16; shift > 0; shift /= 2) x ^= x >> shift;
  return x & 1;
}

// The value of an index, as python/csfast/codes/trellis.py has them.
constexpr int8_t trellis_value(int bits, int index) {
  constexpr int8_t kTable[kTrellisBitsMax + 1][2 << kTrellisBitsMax] = {
      {},
      {-63, -12, 12, 63},
      {-63, -36, -19, -6, 6, 19, 36, 63},
      {-63, -46, -35, -26, -19, -13, -8, -3, 3, 8, 13, 19, 26, 35, 46, 63},
      {-63, -52, -45, -40, -35, -31, -28, -25, -22, -19, -16, -13, -10, -7, -4, -1,
       1,   4,   7,   10,  13,  16,  19,  22,  25,  28,  31,  35,  40,  45, 52, 63},
  };
  return kTable[bits][index];
}

// What the four inputs of a byte's nibble add to the subsets of four steps, two bits a step: by
// nibble, for the nibble of these steps (0 tiles ago), and of those of one tile and two tiles ago.
struct Subsets {
  uint8_t of[3][16];
};

constexpr Subsets subsets_of(Polynomials h) {
  Subsets subsets{};
  for (int ago = 0; ago < 3; ++ago) {
    for (uint32_t nibble = 0; nibble < 16; ++nibble) {
      uint32_t pairs = 0;
      for (int step = 0; step < kLaneSteps; ++step) {
        for (int bit = 0; bit < kLaneSteps; ++bit) {
          const int delay = step - bit + ago * kLaneSteps;
          if (delay < 0 || delay > kTrellisMemoryMax || (nibble >> bit & 1) == 0) continue;
          pairs ^= (2 * (h.h0 >> delay & 1) + (h.h1 >> delay & 1)) << 2 * step;
        }
      }
      subsets.of[ago][nibble] = static_cast<uint8_t>(pairs);
    }
  }
  return subsets;
}

inline constexpr Subsets kSubsets = subsets_of(polynomials_of(kTrellisMemoryMax));

// The subset, an index modulo 4, by the window of inputs, the newest in bit 0.
constexpr uint32_t subset_of(uint32_t window, Polynomials h) {
  return 2 * parity_of(window & h.h0) + parity_of(window & h.h1);
}

constexpr int64_t trellis_row_tiles(int64_t rows) {
  return (rows + kTrellisRows - 1) / kTrellisRows;
}

constexpr int64_t trellis_col_tiles(int64_t cols) {
  return (cols + kTrellisCols - 1) / kTrellisCols;
}

// The place of a weight in its byte.
constexpr int place_of(int64_t row, int64_t col) {
  return static_cast<int>(col % kTrellisCols / 4 * kLaneSteps + row % kTrellisRows / kLanes);
}

// The byte of a weight among those of its tile that have one bit of each.
constexpr int64_t byte_of(int64_t row, int64_t col) {
  return row % kLanes * 4 + col % 4;
}

// The bit of its byte where the raw bit of a place stands, where a weight has two bits.
constexpr int raw_bit_of(int place) {
  constexpr int kBit[2 * kLaneSteps] = {2, 3, 6, 7, 0, 1, 4, 5};
  return kBit[place];
}

}  // namespace csfast
