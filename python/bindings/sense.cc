#include "csfast/sense.h"

#include "call.h"
#include "codes.h"

using namespace nb::literals;

namespace {

void sense(nb::handle codes, nb::handle equal, nb::handle x, int code, nb::handle q, nb::handle y,
           nb::handle scale, uintptr_t stream) {
  Call call("sense");
  Size batch{"batch"}, d{"d"}, n{"n_neurons"}, two{"2", 2};
  csfast::SenseParams p{};
  p.x = call.in_type(x, "x", {&batch, &d});
  p.code = code_of(code);
  CodeSizes sizes(p.code, d);
  Size width{"q_width", csfast::q_width(d)};
  p.codes = call.in<uint8_t>(codes, "codes", {&n, &two, &sizes.groups, &sizes.bytes});
  p.equal = call.in<float>(equal, "equal", {&d});
  p.q = call.out<int8_t>(q, "q", {&batch, &width});
  p.y = call.out<int32_t>(y, "y", {&batch, &n, &two});
  p.scale = call.out<float>(scale, "scale", {&batch});
  p.batch = batch;
  p.d = d;
  p.n_neurons = n;
  p.dtype = call.dtype();
  unlocked([&] { csfast::sense(p, call.device(), stream_of(stream)); });
}

}  // namespace

void bind_sense(nb::module_& m) {
  m.def("q_width", &csfast::q_width, "d"_a);
  m.def("sense", &sense, "codes"_a, "equal"_a, "x"_a, "code"_a, "q"_a, "y"_a, "scale"_a, "stream"_a,
        nb::sig("def sense(codes: torch.Tensor, equal: torch.Tensor, x: torch.Tensor, code: int, "
                "q: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, stream: int) -> None"));
}
