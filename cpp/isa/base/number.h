// The 16-bit number formats, for processors that know neither.
#pragma once

#include <bit>
#include <cstdint>

#include "csfast/types.h"

namespace csfast::base {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float v) {
  return v;
}

inline float to_float(BFloat16 v) {
  return std::bit_cast<float>(uint32_t{v.bits} << 16);
}

inline float to_float(Half v) {
  const uint32_t sign = uint32_t{v.bits & 0x8000u} << 16;
  const uint32_t shifted = uint32_t{v.bits & 0x7fffu} << 13;
  // 2^112 is the distance of the two exponent biases; subnormal halves come out right as well.
  uint32_t value = std::bit_cast<uint32_t>(std::bit_cast<float>(shifted) * 0x1p112f);
  if (shifted >= 0x0f800000u) value = shifted | 0x7f800000u;  // infinity and not-a-number
  return std::bit_cast<float>(value | sign);
}

template <typename T>
T from_float(float v);

template <>
inline float from_float<float>(float v) {
  return v;
}

template <>
inline BFloat16 from_float<BFloat16>(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  if (v != v) return {uint16_t(bits >> 16 | 0x0040u)};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};  // half to even
}

template <>
inline Half from_float<Half>(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t value = bits & 0x7fffffffu;
  if (value > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (value >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65,520 and more round to infinity
  if (value < 0x38800000u) {  // below 2^-14: adding 1/2 leaves units of 2^-24 in the last bits
    const float units = std::bit_cast<float>(value) + 0.5f;
    return {uint16_t(sign | (std::bit_cast<uint32_t>(units) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((value - 0x38000000u + 0xfffu + (value >> 13 & 1u)) >> 13))};
}

// Calls f.operator()<T>() with the C++ type that `dtype` names.
template <typename F>
auto dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f.template operator()<float>();
    case DType::kF16:
      return f.template operator()<Half>();
    default:
      return f.template operator()<BFloat16>();
  }
}

}  // namespace csfast::base
