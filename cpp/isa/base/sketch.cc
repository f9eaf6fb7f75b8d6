// The product of a row tile on any processor: four of its sixteen lanes at once.
#include "csfast/sketch.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "isa/base/number.h"
#include "loops.h"

namespace csfast::base {
namespace {

struct Bytes {
  uint8_t of[16];
};
struct Sums {
  int32_t of[4] = {};
};

constexpr int kBytes = 16;
constexpr int kRowsMost = 2;  // of the batch at once

template <typename F>
Bytes each(F&& f) {
  Bytes result;
  for (int i = 0; i < kBytes; ++i) result.of[i] = static_cast<uint8_t>(f(i));
  return result;
}
constexpr int64_t kAhead = 0;

void prefetch(const void*) {}
Bytes load(const void* p) {
  Bytes result;
  std::memcpy(result.of, p, kBytes);
  return result;
}
void store(int32_t* p, const Sums& x) {
  std::memcpy(p, x.of, sizeof(x.of));
}
Bytes fill(int x) {
  return each([&](int) { return x; });
}
Bytes table_of(const uint8_t* places) {
  return load(places);
}
Bytes four(const int8_t* p) {
  return each([&](int i) { return p[i % 4]; });
}
Bytes both(const Bytes& a, const Bytes& b) {
  return each([&](int i) { return a.of[i] & b.of[i]; });
}
template <int kBits>
Bytes right(const Bytes& x) {
  return each([&](int i) { return x.of[i] >> kBits; });
}
template <int kBits>
Bytes left(const Bytes& x) {
  return each([&](int i) { return x.of[i] << kBits; });
}
// Bits 0, 1, 4 and 5 of the pairs, the others of raw.
Bytes merge(const Bytes& pairs, const Bytes& raw) {
  return each([&](int i) { return (pairs.of[i] & 0x33) | (raw.of[i] & 0xcc); });
}
// Bits that an odd number of the three have.
Bytes odd_of(const Bytes& a, const Bytes& b, const Bytes& c) {
  return each([&](int i) { return a.of[i] ^ b.of[i] ^ c.of[i]; });
}
Bytes lookup(const Bytes& table, const Bytes& index) {
  return each([&](int i) { return table.of[index.of[i] & 15]; });
}
Bytes where_bit(const Bytes& bits, int bit, const Bytes& a, const Bytes& b) {
  return each([&](int i) { return bits.of[i] & bit ? a.of[i] : b.of[i]; });
}
Sums dot(Sums sums, const Bytes& values, const Bytes& x) {
  for (int i = 0; i < kBytes; ++i) sums.of[i / 4] += values.of[i] * static_cast<int8_t>(x.of[i]);
  return sums;
}

}  // namespace

#include "isa/sketch.inc"

}  // namespace csfast::base
