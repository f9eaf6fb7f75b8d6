// How the few-bit codes of a neuron's rows lie in memory. Every sensor reads this layout.
//
// A row of d weights becomes d codes u, each standing for an integer times the row's scale. Codes
// lie in groups of bytes; the gate row and the up row of a neuron are neighbours:
// (n_neurons, 2, groups, group_bytes). Codes of padding channels meet activations that are zero.
//
// Planes of 1 to 4 bits: u in [0, 2^bits) stands for 2 u - (2^bits - 1). A group is a chunk of 128
// channels in 16 * bits bytes:
//
//   bits 1   16 bytes: bit i of byte m is channel 8 m + i
//   bits 2   32 bytes: bits 2 s, 2 s + 1 of byte m are channel 32 s + m
//   bits 3   the 2-bit chunk of u & 3, then the 1-bit chunk of u >> 2
//   bits 4   the 2-bit chunk of u & 3, then the 2-bit chunk of u >> 2
//
// so that 32 bytes, shifted by 0 and 2 and then by 4 and 6, are 64 neighbouring channels each time.
//
// Ternary: u in [0, 2] stands for u - 1. A byte holds five channels, a group is 16 bytes, and the
// channels of a byte lie as far apart as the row has bytes, w: digit k of byte i is channel
// k w + i. So neighbouring bytes are neighbouring channels for every digit, at any vector width.
// The byte is its digits as a fraction in base 3, rounded up to a 256th:
//
//   byte = ceil(256 / 243 * (81 u_0 + 27 u_1 + 9 u_2 + 3 u_3 + u_4))
//
// so that three times the byte, divided by 256, has the next digit as its quotient and the byte of
// the digits after it as its remainder. Rounding up adds less than 3^k / 256 after k digits, and
// the next multiple of 3^k / 243 is farther than that.
#pragma once

#include <cstdint>

namespace csfast {

enum class Code : uint8_t { kBits1 = 1, kBits2, kBits3, kBits4, kTernary };

inline constexpr int64_t kChunk = 128;     // channels of a group of planes
inline constexpr int64_t kTritGroup = 80;  // channels of a ternary group
inline constexpr int kTrits = 5;           // in a byte
inline constexpr int kBitsMax = 4;
inline constexpr int64_t kTernaryWidthMax = 1 << 19;  // channels; what sums of whole bytes allow

constexpr bool is_known(Code code) {
  return code >= Code::kBits1 && code <= Code::kTernary;
}
constexpr bool is_planes(Code code) {
  return code >= Code::kBits1 && code <= Code::kBits4;
}

// Of a code that is planes.
constexpr int bits_of(Code code) {
  return static_cast<int>(code);
}

constexpr int64_t chunks_of(int64_t d) {
  return (d + kChunk - 1) / kChunk;
}
constexpr int64_t groups_of(int64_t d, Code code) {
  return is_planes(code) ? chunks_of(d) : (d + kTritGroup - 1) / kTritGroup;
}
constexpr int64_t group_bytes(Code code) {
  return is_planes(code) ? 16 * bits_of(code) : 16;
}
constexpr int64_t row_bytes(int64_t d, Code code) {
  return groups_of(d, code) * group_bytes(code);
}

// Room for one quantised activation, zero beyond d. Whole chunks, and one more for the last ternary
// group, which ends less than a group beyond d: the same for every code, so that whoever asks for
// memory need not know which.
constexpr int64_t q_width(int64_t d) {
  return (chunks_of(d) + 1) * kChunk;
}

}  // namespace csfast
