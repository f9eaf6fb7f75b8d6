#include "csfast/read.h"

#include <nanobind/stl/vector.h>

#include "call.h"

using namespace nb::literals;

namespace {

// Buffers by their addresses: of any type, and more than one call has names for.
void read_buffers(const std::vector<uintptr_t>& address, const std::vector<int64_t>& bytes,
                  nb::handle sums, uintptr_t stream) {
  Call call("read");
  Size n_sums{"sums"};
  auto* sum = reinterpret_cast<uint32_t*>(call.out<int32_t>(sums, "sums", {&n_sums}));
  if (address.size() != bytes.size()) {
    throw nb::value_error("[read] addresses and sizes differ in number: want a size for each.");
  }
  std::vector<csfast::Span> spans;
  for (size_t i = 0; i < address.size(); ++i) {
    spans.push_back({reinterpret_cast<const void*>(address[i]), bytes[i]});
  }
  const csfast::Device device = call.device();
  if (n_sums != csfast::read_sums(device)) {
    throw nb::value_error("[read] sums: want as many as read_sums says.");
  }
  unlocked([&] {
    csfast::read({.span = spans.data(), .n_spans = static_cast<int>(spans.size()), .sum = sum},
                 device, stream_of(stream));
  });
}

int64_t sums_of(bool cuda) {
  return csfast::read_sums(cuda ? csfast::Device::kCuda : csfast::Device::kCpu);
}

}  // namespace

void bind_read(nb::module_& m) {
  m.def("read", &read_buffers, "address"_a, "bytes"_a, "sums"_a, "stream"_a,
        nb::sig("def read(address: list[int], bytes: list[int], sums: torch.Tensor, stream: int) "
                "-> None"));
  m.def("read_sums", &sums_of, "cuda"_a);
}
