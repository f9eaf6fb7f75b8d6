#include "csfast/nested.h"

#include <string>

#include "call.h"
#include "number.h"

using namespace nb::literals;

namespace {

// The lists have an entry a level.
void nested(nb::list codes, nb::list exponent, nb::list top, nb::handle equal, nb::handle x,
            nb::list bits, nb::handle q, nb::handle y, nb::handle scale, uintptr_t stream) {
  Call call("nested");
  Size batch{"batch"}, d{"d"}, n{"n_neurons"}, two{"2", 2};
  csfast::NestedParams p{};
  p.x = call.in_type(x, "x", {&batch, &d});
  const size_t n_levels = bits.size();
  if (n_levels > csfast::kLevelsMax || codes.size() != n_levels || exponent.size() != n_levels ||
      top.size() != n_levels) {
    throw nb::value_error(
        ("[nested] " + std::to_string(codes.size()) + " codes, " + std::to_string(exponent.size()) +
         " exponents, " + std::to_string(top.size()) + " tops, " + std::to_string(n_levels) +
         " bits: want as many of each, at most " + std::to_string(csfast::kLevelsMax) + ".")
            .c_str());
  }
  Size chunks{"chunks", csfast::chunks_of(d)};
  Size groups{"2 * chunks", csfast::step_groups_of(d)};
  for (size_t l = 0; l < n_levels; ++l) {
    const std::string at = "[" + std::to_string(l) + "]";
    csfast::NestedLevel& level = p.level[l];
    level.bits = nb::cast<int>(bits[l]);
    Size bytes{"16 * bits", 16 * int64_t{level.bits}};
    level.codes = call.in<uint8_t>(codes[l], ("codes" + at).c_str(), {&n, &two, &chunks, &bytes});
    level.exponent = call.in<uint8_t>(exponent[l], ("exponent" + at).c_str(), {&n, &two, &groups});
    level.top = reinterpret_cast<const uint16_t*>(
        call.in<BFloat16>(top[l], ("top" + at).c_str(), {&n, &two}));
  }
  p.equal = call.in<float>(equal, "equal", {&d});
  Size width{"q_width", csfast::q_width(d)};
  p.q = call.out<int8_t>(q, "q", {&batch, &width});
  p.y = call.out<float>(y, "y", {&batch, &n, &two});
  p.scale = call.out<float>(scale, "scale", {&batch});
  p.batch = batch;
  p.d = d;
  p.n_neurons = n;
  p.n_levels = static_cast<int>(n_levels);
  p.dtype = call.dtype();
  unlocked([&] { csfast::nested(p, call.device(), stream_of(stream)); });
}

}  // namespace

void bind_nested(nb::module_& m) {
  m.def("nested", &nested, "codes"_a, "exponent"_a, "top"_a, "equal"_a, "x"_a, "bits"_a, "q"_a,
        "y"_a, "scale"_a, "stream"_a,
        nb::sig("def nested(codes: list[torch.Tensor], exponent: list[torch.Tensor], "
                "top: list[torch.Tensor], equal: torch.Tensor, x: torch.Tensor, bits: list[int], "
                "q: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, stream: int) -> None"));
}
