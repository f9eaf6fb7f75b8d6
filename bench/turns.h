// Variants of one problem that take turns, so that whatever disturbs them disturbs all.
#pragma once

#include <chrono>
#include <cstddef>
#include <vector>

namespace csfast::bench {

template <typename F>
double seconds_of(F&& call) {
  const auto start = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Calls call(variant, calls before) for each variant `runs` times, after two that are not timed,
// and puts the times into its seconds. Another one begins each turn.
template <typename Variant, typename F>
void take_turns(std::vector<Variant>& variants, int runs, F&& call) {
  constexpr int kWarmup = 2;
  size_t calls = 0;
  for (int turn = -kWarmup; turn < runs; ++turn) {
    for (size_t i = 0; i < variants.size(); ++i) {
      Variant& variant = variants[(turn + kWarmup + i) % variants.size()];
      const double seconds = seconds_of([&] { call(variant, calls); });
      ++calls;
      if (turn >= 0) variant.seconds.push_back(seconds);
    }
  }
}

}  // namespace csfast::bench
