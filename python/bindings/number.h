// bfloat16 as the element type of a tensor.
#pragma once

#include <cstdint>

#include "call.h"

struct BFloat16 {
  uint16_t bits;
};

template <>
struct nb::detail::dtype_traits<BFloat16> {
  static constexpr nb::dlpack::dtype value{uint8_t(nb::dlpack::dtype_code::Bfloat), 16, 1};
  static constexpr auto name = nb::detail::const_name("bfloat16");
};
