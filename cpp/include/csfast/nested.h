// Nested: measurements of every neuron's own rows by codes in levels, whose steps follow the row.
//
//   y[b, j, r] = sum_l top_l[j, r] / 2 * s_l[b, j, r]      l < n_levels; r = 0 gate, 1 up
//   s_l[b, j, r] = sum_g factor(exponent_l[j, r, g]) * n_l[b, j, r, g]
//   n_l[b, j, r, g] = sum_{c in g} (2 u_l[j, r, c] - (2^bits_l - 1)) q[b, c]
//
// with q and scale as sense.h has them. The first level is a code of its own, each further one
// codes what the levels before it leave of the weights: fewer levels are a coarser measurement, and
// more of them refine it. A group g is kStepGroup neighbouring channels that share a step, top *
// factor(exponent), and a code u stands for u - (2^bits - 1) / 2 steps.
//
// A level is three arrays of its own, so that whoever reads the first levels alone touches nothing
// of the others. Codes are planes of bits (planes.h): the two groups of a chunk are contiguous in
// its bytes, the first has shifts 0 and 2 of its pairs and bytes 0 to 7 of its single bits.
// Exponents and codes of padding channels may be anything, they meet activations that are zero.
//
// n is an exact integer, whatever parts it is added up in. Its product with the factor and the sum
// over groups are float32, in an order that depends on d alone; s times half the top is rounded
// once, and so is adding it to the levels before. So y does not depend on the number of threads,
// the rest of the batch, where arrays begin, or levels beyond n_levels.
#pragma once

#include <bit>
#include <cstdint>

#include "csfast/planes.h"
#include "csfast/types.h"

namespace csfast {

inline constexpr int64_t kStepGroup = 64;  // channels that share a step
inline constexpr int kStepOctave = 16;     // exponents by which a step halves
inline constexpr int kLevelsMax = 4;

constexpr int64_t step_groups_of(int64_t d) {
  return chunks_of(d) * (kChunk / kStepGroup);
}

// 2^(-i / kStepOctave), rounded to float32, for i in [0, kStepOctave).
constexpr float mantissa_of(int i) {
  constexpr float kMantissa[kStepOctave] = {
      0x1p+0f,        0x1.ea4afap-1f, 0x1.d5818ep-1f, 0x1.c199bep-1f,
      0x1.ae89fap-1f, 0x1.9c4918p-1f, 0x1.8ace54p-1f, 0x1.7a1148p-1f,
      0x1.6a09e6p-1f, 0x1.5ab07ep-1f, 0x1.4bfdaep-1f, 0x1.3dea64p-1f,
      0x1.306fe0p-1f, 0x1.2387a6p-1f, 0x1.172b84p-1f, 0x1.0b5586p-1f,
  };
  return kMantissa[i];
}

// 2^(-exponent / kStepOctave) from its mantissa: a power of two is exact, and no product is needed.
constexpr float factor_of(float mantissa, int exponent) {
  const uint32_t octaves = static_cast<uint32_t>(exponent / kStepOctave);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(mantissa) - (octaves << 23));
}

struct NestedLevel {
  const uint8_t* codes;     // (n_neurons, 2, chunks, 16 * bits), see planes.h
  const uint8_t* exponent;  // (n_neurons, 2, step_groups)
  const uint16_t* top;      // (n_neurons, 2), bfloat16: the largest step of a row
  int bits;                 // 1 .. kBitsMax
};

struct NestedParams {
  NestedLevel level[kLevelsMax];
  const float* equal;  // (d)
  const void* x;       // (batch, d), T
  int8_t* q;           // (batch, q_width), written; zero beyond d
  float* y;            // (batch, n_neurons, 2), written
  float* scale;        // (batch), written
  int64_t batch, d, n_neurons;
  int n_levels;  // of `level` that are read, the first: 1 .. kLevelsMax
  DType dtype;   // T
};

// Throws std::invalid_argument if the sizes make no sense, BackendError if the device fails.
// Asynchronous on CUDA.
void nested(const NestedParams& p, Device device, Stream stream);

namespace cuda {
void nested(const NestedParams& p, Stream stream);
}

}  // namespace csfast
