#include "csfast/sketch.h"

#include <string>

#include "call.h"
#include "number.h"

using namespace nb::literals;

namespace {

// The lists have an entry a level.
void sketch(nb::list step, nb::list codes, nb::handle turn, nb::handle x, nb::list bits,
            nb::handle z, nb::handle q, nb::handle scale, nb::handle y, uintptr_t stream) {
  Call call("sketch");
  Size batch{"batch"}, cols{"cols"}, rows{"rows"};
  csfast::SketchParams p{};
  p.x = call.in_type(x, "x", {&batch, &cols});
  const size_t n_levels = bits.size();
  if (n_levels > csfast::kSketchLevelsMax || codes.size() != n_levels || step.size() != n_levels) {
    throw nb::value_error(("[sketch] " + std::to_string(codes.size()) + " codes, " +
                           std::to_string(step.size()) + " steps, " + std::to_string(n_levels) +
                           " bits: want as many of each, at most " +
                           std::to_string(csfast::kSketchLevelsMax) + ".")
                              .c_str());
  }
  for (size_t l = 0; l < n_levels; ++l) {
    const std::string at = "[" + std::to_string(l) + "]";
    csfast::SketchLevel& level = p.level[l];
    level.bits = nb::cast<int>(bits[l]);
    level.step = reinterpret_cast<const uint16_t*>(
        call.in<BFloat16>(step[l], ("step" + at).c_str(), {&rows}));
    Size down{"ceil(rows / 64)", csfast::trellis_row_tiles(rows)};
    Size across{"ceil(cols / 8)", csfast::trellis_col_tiles(cols)};
    Size per_weight{"bits", level.bits}, bytes{"64", csfast::kTileBytes};
    level.codes =
        call.in<uint8_t>(codes[l], ("codes" + at).c_str(), {&down, &across, &per_weight, &bytes});
  }
  p.turn = reinterpret_cast<const uint32_t*>(call.in<int32_t>(turn, "turn", {&cols}));
  Size width{"q_width", csfast::sketch_width(cols)};
  p.z = call.out<float>(z, "z", {&batch, &cols});
  p.q = call.out<int8_t>(q, "q", {&batch, &width});
  p.scale = call.out<float>(scale, "scale", {&batch});
  p.y = call.out<float>(y, "y", {&batch, &rows});
  p.batch = batch;
  p.rows = rows;
  p.cols = cols;
  p.n_levels = static_cast<int>(n_levels);
  p.dtype = call.dtype();
  unlocked([&] { csfast::sketch(p, call.device(), stream_of(stream)); });
}

}  // namespace

void bind_sketch(nb::module_& m) {
  m.def("sketch", &sketch, "step"_a, "codes"_a, "turn"_a, "x"_a, "bits"_a, "z"_a, "q"_a, "scale"_a,
        "y"_a, "stream"_a,
        nb::sig("def sketch(step: list[torch.Tensor], codes: list[torch.Tensor], "
                "turn: torch.Tensor, x: torch.Tensor, bits: list[int], "
                "z: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, y: torch.Tensor, "
                "stream: int) -> None"));
  m.def("sketch_width", &csfast::sketch_width, "cols"_a);
}
