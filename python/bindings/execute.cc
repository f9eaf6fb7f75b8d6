#include "csfast/execute.h"

#include <nanobind/stl/string.h>

#include "call.h"
#include "layer.h"

using namespace nb::literals;

namespace {

void execute(nb::handle gate, nb::handle up, nb::handle down_t, nb::handle x, nb::handle tiles,
             nb::handle n_tiles, int tile_rows, nb::handle gate_bias, nb::handle up_bias,
             nb::handle down_bias, const char* activation, const char* design, nb::handle workspace,
             nb::handle out, uintptr_t stream) {
  Call call("execute");
  LayerSizes sizes;
  const Size& batch = sizes.batch;
  Size lists{"1 or batch"};
  csfast::ExecuteParams p{};
  p.x = call.in_type(x, "x", {&sizes.batch, &sizes.d});
  p.weights = unpack(call, sizes, WeightsArgs{gate, up, down_t, gate_bias, up_bias, down_bias});
  p.form = form_of(call, sizes, activation);
  Size width{"n_tiles_max", tile_rows > 0 ? csfast::n_tiles_max(sizes.n, tile_rows) : -1};
  p.tile = call.in<int32_t>(tiles, "tile", {&lists, &width});
  if (lists != 1 && lists != batch) {
    throw nb::value_error(("[execute] tile has " + std::to_string(lists) +
                           " rows: want 1, or batch = " + std::to_string(batch) + ".")
                              .c_str());
  }
  p.n_tiles = call.in<int32_t>(n_tiles, "n_tiles", {&lists});
  p.out = call.out_type(out, "out", {&sizes.batch, &sizes.d});
  p.workspace =
      call.workspace(workspace, csfast::execute_workspace(batch, sizes.d, sizes.n, call.device()));
  p.batch = batch;
  p.tile_rows = tile_rows;
  p.shared = lists == 1;
  p.design = csfast::parse_design("execute", design);
  unlocked([&] { csfast::execute(p, call.device(), stream_of(stream)); });
}

int64_t execute_workspace(int64_t batch, int64_t d, int64_t n_neurons, bool cuda) {
  return csfast::execute_workspace(batch, d, n_neurons,
                                   cuda ? csfast::Device::kCuda : csfast::Device::kCpu);
}

std::string choose(int64_t batch, int64_t d, int64_t n_neurons, int tile_rows, bool shared,
                   bool senses, int element_bytes, const char* design, int capability,
                   int n_processors, int shared_bytes) {
  csfast::ExecuteParams p{};
  p.batch = batch;
  p.form.d = d;
  p.form.n_neurons = n_neurons;
  p.tile_rows = tile_rows;
  p.shared = shared;
  p.form.dtype = element_bytes == 4 ? csfast::DType::kF32 : csfast::DType::kBF16;
  p.design = csfast::parse_design("execute", design);
  return to_string(csfast::choose(
      p, {.capability = capability, .n_processors = n_processors, .shared_bytes = shared_bytes},
      senses));
}

}  // namespace

void bind_execute(nb::module_& m) {
  m.def(
      "execute", &execute, "gate"_a, "up"_a, "down_t"_a, "x"_a, "tile"_a, "n_tiles"_a,
      "tile_rows"_a, "gate_bias"_a.none(), "up_bias"_a.none(), "down_bias"_a.none(), "activation"_a,
      "design"_a, "workspace"_a, "out"_a, "stream"_a,
      nb::sig(
          "def execute(gate: torch.Tensor, up: torch.Tensor, down_t: torch.Tensor, "
          "x: torch.Tensor, tile: torch.Tensor, n_tiles: torch.Tensor, tile_rows: int, "
          "gate_bias: torch.Tensor | None, up_bias: torch.Tensor | None, "
          "down_bias: torch.Tensor | None, activation: str, design: str, workspace: torch.Tensor, "
          "out: torch.Tensor, stream: int) -> None"));
  m.def("choose", &choose, "batch"_a, "d"_a, "n_neurons"_a, "tile_rows"_a, "shared"_a, "senses"_a,
        "element_bytes"_a, "design"_a, "capability"_a, "n_processors"_a, "shared_bytes"_a);
  m.def("execute_workspace", &execute_workspace, "batch"_a, "d"_a, "n_neurons"_a, "cuda"_a);
}
