// The search for the best path on any processor: the lanes are an array.
#include "csfast/encode.h"

#include <utility>

#include "loops.h"

namespace csfast::base {
namespace {

struct Lanes {
  float of[kLanes];
};
struct Less {
  int32_t of[kLanes];
};

template <typename F>
Lanes each(F&& f) {
  Lanes result;
  for (int i = 0; i < kLanes; ++i) result.of[i] = f(i);
  return result;
}
Lanes load(const float* p) {
  return each([&](int i) { return p[i]; });
}
void store(float* p, const Lanes& x) {
  for (int i = 0; i < kLanes; ++i) p[i] = x.of[i];
}
Lanes all(float x) {
  return each([&](int) { return x; });
}
Lanes add(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.of[i] + b.of[i]; });
}
Lanes subtract(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.of[i] - b.of[i]; });
}
Lanes multiply(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.of[i] * b.of[i]; });
}
Less is_less(const Lanes& a, const Lanes& b) {
  Less result;
  for (int i = 0; i < kLanes; ++i) result.of[i] = a.of[i] < b.of[i];
  return result;
}
Lanes choose(const Less& less, const Lanes& a, const Lanes& b) {
  return each([&](int i) { return less.of[i] ? a.of[i] : b.of[i]; });
}
uint16_t mask_of(const Less& less) {
  int mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= less.of[i] << i;
  return static_cast<uint16_t>(mask);
}

}  // namespace

#include "isa/viterbi.inc"

}  // namespace csfast::base
