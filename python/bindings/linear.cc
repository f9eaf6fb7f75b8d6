#include "csfast/linear.h"

#include "call.h"

using namespace nb::literals;

namespace {

void linear(nb::handle w, nb::handle x, nb::handle bias, nb::handle work, nb::handle y,
            uintptr_t stream) {
  Call call("linear");
  Size batch{"batch"}, cols{"cols"}, rows{"rows"};
  csfast::LinearParams p{};
  p.w = call.in_type(w, "w", {&rows, &cols});
  if (call.dtype() == csfast::DType::kF16) {
    throw nb::type_error("[linear] w is float16: want float32 or bfloat16.");
  }
  p.x = call.in<float>(x, "x", {&batch, &cols});
  p.bias = call.in_type_or_null(bias, "bias", {&rows});
  Size width{"linear_width", csfast::linear_width(cols)};
  p.work = call.out<float>(work, "work", {&batch, &width});
  p.y = call.out<float>(y, "y", {&batch, &rows});
  p.batch = batch;
  p.rows = rows;
  p.cols = cols;
  p.dtype = call.dtype();
  unlocked([&] { csfast::linear(p, call.device(), stream_of(stream)); });
}

}  // namespace

void bind_linear(nb::module_& m) {
  m.def("linear", &linear, "w"_a, "x"_a, "bias"_a.none(), "work"_a, "y"_a, "stream"_a,
        nb::sig("def linear(w: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, "
                "work: torch.Tensor, y: torch.Tensor, stream: int) -> None"));
  m.def("linear_width", &csfast::linear_width, "cols"_a);
}
