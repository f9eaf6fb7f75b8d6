#include "csfast/recover.h"

#include "call.h"

using namespace nb::literals;

namespace {

// `limit` is the threshold or the budget, by `top`.
void recover(nb::handle y, nb::handle scale, nb::handle row_scale, nb::handle limit, bool top,
             nb::handle offset, nb::handle votes, int tile_rows, const char* activation,
             nb::handle index, nb::handle count, nb::handle usage, nb::handle missed,
             uintptr_t stream) {
  Call call("recover");
  Size batch{"batch"}, n{"n_neurons"}, columns{"columns"}, one{"1", 1};
  csfast::RecoverParams p{};
  if (holds<float>(y)) {
    p.y_float = call.in<float>(y, "y", {&batch, &n, &columns});
  } else {
    p.y = call.in<int32_t>(y, "y", {&batch, &n, &columns});
  }
  p.scale = call.in<float>(scale, "scale", {&batch});
  p.row_scale = call.in<float>(row_scale, "row_scale", {&n, &columns});
  p.offset = call.in_or_null<float>(offset, "offset", {&n, &columns});
  p.votes = call.in_or_null<float>(votes, "votes", {&batch});
  Size& lists = p.votes == nullptr ? batch : one;
  Size width{"n_tiles_max", tile_rows > 0 ? csfast::n_groups(n, tile_rows) : -1};
  p.rule = top ? csfast::Rule::kTopK : csfast::Rule::kThreshold;
  if (top) {
    p.budget = call.in<int32_t>(limit, "budget", {&lists});
  } else {
    p.threshold = call.in<float>(limit, "threshold", {&lists});
  }
  p.usage = call.out<float>(usage, "usage", {&lists, &width});
  p.index = call.out<int32_t>(index, "index", {&lists, &width});
  p.count = call.out<int32_t>(count, "count", {&lists});
  p.missed = call.out<float>(missed, "missed", {&lists});
  p.batch = batch;
  p.n_neurons = n;
  p.columns = static_cast<int>(columns);
  p.group_rows = tile_rows;
  p.activation = call.activation(activation);
  unlocked([&] { csfast::recover(p, call.device(), stream_of(stream)); });
}

}  // namespace

void bind_recover(nb::module_& m) {
  m.def("recover", &recover, "y"_a, "scale"_a, "row_scale"_a, "limit"_a, "top"_a, "offset"_a.none(),
        "votes"_a.none(), "tile_rows"_a, "activation"_a, "index"_a, "count"_a, "usage"_a,
        "missed"_a, "stream"_a,
        nb::sig("def recover(y: torch.Tensor, scale: torch.Tensor, row_scale: torch.Tensor, "
                "limit: torch.Tensor, top: bool, offset: torch.Tensor | None, "
                "votes: torch.Tensor | None, tile_rows: int, activation: str, "
                "index: torch.Tensor, count: torch.Tensor, usage: torch.Tensor, "
                "missed: torch.Tensor, stream: int) -> None"));
}
