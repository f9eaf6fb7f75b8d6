#include "csfast/recover.h"

#include "call.h"

using namespace nb::literals;

namespace {

// `limit` is the threshold or the budget, by `top`.
void recover(nb::handle y, nb::handle scale, nb::handle row_scale, nb::handle limit, bool top,
             nb::handle usage, nb::handle index, nb::handle count, nb::handle missed,
             uintptr_t stream) {
  Call call("recover");
  Size batch{"batch"}, n{"n_neurons"}, two{"2", 2};
  csfast::RecoverParams p{};
  p.y = call.in<int32_t>(y, "y", {&batch, &n, &two});
  p.scale = call.in<float>(scale, "scale", {&batch});
  p.row_scale = call.in<float>(row_scale, "row_scale", {&n, &two});
  p.rule = top ? csfast::Rule::kTopK : csfast::Rule::kThreshold;
  if (top) {
    p.budget = call.in<int32_t>(limit, "budget", {&batch});
  } else {
    p.threshold = call.in<float>(limit, "threshold", {&batch});
  }
  p.usage = call.out<float>(usage, "usage", {&batch, &n});
  p.index = call.out<int32_t>(index, "index", {&batch, &n});
  p.count = call.out<int32_t>(count, "count", {&batch});
  p.missed = call.out<float>(missed, "missed", {&batch});
  p.batch = batch;
  p.n_neurons = n;
  unlocked([&] { csfast::recover(p, call.device(), stream_of(stream)); });
}

}  // namespace

void bind_recover(nb::module_& m) {
  m.def("recover", &recover, "y"_a, "scale"_a, "row_scale"_a, "limit"_a, "top"_a, "usage"_a,
        "index"_a, "count"_a, "missed"_a, "stream"_a,
        nb::sig("def recover(y: torch.Tensor, scale: torch.Tensor, row_scale: torch.Tensor, "
                "limit: torch.Tensor, top: bool, usage: torch.Tensor, index: torch.Tensor, "
                "count: torch.Tensor, missed: torch.Tensor, stream: int) -> None"));
}
