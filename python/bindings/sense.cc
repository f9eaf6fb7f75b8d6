#include "csfast/sense.h"

#include "call.h"

using namespace nb::literals;

namespace {

void sense(nb::handle codes, nb::handle equal, nb::handle x, int bits, nb::handle q, nb::handle y,
           nb::handle scale, uintptr_t stream) {
  Call call("sense");
  Size batch{"batch"}, d{"d"}, n{"n_neurons"}, two{"2", 2};
  csfast::SenseParams p{};
  p.x = call.in_type(x, "x", {&batch, &d});
  Size chunks{"chunks", csfast::chunks_of(d)}, bytes{"16 * bits", 16 * int64_t{bits}};
  Size padded{"128 * chunks", chunks * csfast::kChunk};
  p.codes = call.in<uint8_t>(codes, "codes", {&n, &two, &chunks, &bytes});
  p.equal = call.in<float>(equal, "equal", {&d});
  p.q = call.out<int8_t>(q, "q", {&batch, &padded});
  p.y = call.out<int32_t>(y, "y", {&batch, &n, &two});
  p.scale = call.out<float>(scale, "scale", {&batch});
  p.batch = batch;
  p.d = d;
  p.n_neurons = n;
  p.bits = bits;
  p.dtype = call.dtype();
  unlocked([&] { csfast::sense(p, call.device(), stream_of(stream)); });
}

}  // namespace

void bind_sense(nb::module_& m) {
  m.def("sense", &sense, "codes"_a, "equal"_a, "x"_a, "bits"_a, "q"_a, "y"_a, "scale"_a, "stream"_a,
        nb::sig("def sense(codes: torch.Tensor, equal: torch.Tensor, x: torch.Tensor, bits: int, "
                "q: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, stream: int) -> None"));
}
