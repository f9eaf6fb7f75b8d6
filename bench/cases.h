// What bench_ffn and bench_ffn_cuda time: the cases of `csfast bench`, by its names.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "csfast/planes.h"

namespace csfast::bench {

inline constexpr Code kCode = Code::kBits2;

struct Case {
  const char* name;  // in the results
  int64_t d, n_neurons;
  double density;  // fraction of the neurons that is executed
  int64_t batch;   // rows; more than one share a support
  int block_rows;  // neurons that are kept and read as one
  int layers;      // that rotate, so that no cache holds them
};

#include "cases.inc"

// A benchmark that does not do blocks, or batches, says so of its cases.
constexpr bool have_no_blocks(std::span<const Case> cases) {
  return std::ranges::all_of(cases, [](const Case& c) { return c.block_rows == 1; });
}
constexpr bool have_no_batches(std::span<const Case> cases) {
  return std::ranges::all_of(cases, [](const Case& c) { return c.batch == 1; });
}

// Calls f(cases of one shape, neighbours in `cases`) for each shape, so that they share layers.
template <typename F>
void for_shapes(std::span<const Case> cases, F&& f) {
  for (size_t first = 0, end = 0; first < cases.size(); first = end) {
    const auto is_other = [&](const Case& c) {
      return c.d != cases[first].d || c.n_neurons != cases[first].n_neurons;
    };
    end = std::find_if(cases.begin() + first, cases.end(), is_other) - cases.begin();
    f(cases.subspan(first, end - first));
  }
}

// Bytes that a call has to read: codes, row scales, the equaliser and x (batch, d) ...
inline double select_bytes(const Case& c) {
  return static_cast<double>(c.n_neurons * (2 * row_bytes(c.d, kCode) + 2 * 4) + 4 * c.d +
                             2 * c.batch * c.d);
}

// ... and for `tiles` of the list their numbers, three rows of 16 bits a neuron, and x.
inline double execute_bytes(const Case& c, double tiles) {
  const int64_t tile = c.block_rows * 3 * 2 * c.d + 4;
  return tiles * static_cast<double>(tile) + static_cast<double>(2 * c.batch * c.d);
}

}  // namespace csfast::bench
