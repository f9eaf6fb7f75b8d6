#include "csfast/encode.h"

#include "call.h"

using namespace nb::literals;

namespace {

void encode(nb::handle w, nb::handle feedback, nb::handle step, nb::handle table, int bits, int nu,
            nb::handle workspace, nb::handle codes, nb::handle value, uintptr_t stream) {
  Call call("encode");
  Size rows{"rows"}, cols{"cols"}, levels{"2^(bits + 1)", int64_t{2} << bits};
  csfast::EncodeParams p{};
  p.w = call.in<float>(w, "w", {&rows, &cols});
  p.feedback = call.in<float>(feedback, "feedback", {&cols, &cols});
  p.step = call.in<float>(step, "step", {&rows});
  p.table = call.in<int8_t>(table, "table", {&levels});
  p.workspace = call.workspace(workspace, csfast::encode_workspace(rows, cols, call.device()));
  Size down{"row_tiles", csfast::trellis_row_tiles(rows)};
  Size across{"col_tiles", csfast::trellis_col_tiles(cols)};
  Size per_weight{"bits", bits}, bytes{"64", csfast::kTileBytes};
  p.codes = call.out<uint8_t>(codes, "codes", {&down, &across, &per_weight, &bytes});
  p.value = call.out<int8_t>(value, "value", {&rows, &cols});
  p.rows = rows;
  p.cols = cols;
  p.bits = bits;
  p.nu = nu;
  unlocked([&] { csfast::encode(p, call.device(), stream_of(stream)); });
}

int64_t encode_workspace(int64_t rows, int64_t cols, bool is_cuda) {
  return csfast::encode_workspace(rows, cols,
                                  is_cuda ? csfast::Device::kCuda : csfast::Device::kCpu);
}

}  // namespace

void bind_encode(nb::module_& m) {
  m.def("encode", &encode, "w"_a, "feedback"_a, "step"_a, "table"_a, "bits"_a, "nu"_a,
        "workspace"_a, "codes"_a, "value"_a, "stream"_a,
        nb::sig("def encode(w: torch.Tensor, feedback: torch.Tensor, step: torch.Tensor, "
                "table: torch.Tensor, bits: int, nu: int, workspace: torch.Tensor, "
                "codes: torch.Tensor, value: torch.Tensor, stream: int) -> None"));
  m.def("encode_workspace", &encode_workspace, "rows"_a, "cols"_a, "is_cuda"_a);
}
