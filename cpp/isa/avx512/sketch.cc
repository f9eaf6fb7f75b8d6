// The product of a row tile with AVX-512: all bytes of a tile at once, VNNI.
#include "csfast/sketch.h"

#include <immintrin.h>

#include <bit>
#include <cmath>
#include <cstring>

#include "isa/base/number.h"
#include "loops.h"

namespace csfast::avx512 {
namespace {

using Bytes = __m512i;
using Sums = __m512i;

constexpr int kBytes = 64;
constexpr int kRowsMost = 4;  // of the batch at once: sums of sixteen registers

// The codes are one stream: what will be read in some 200 ns is asked for, which is more than a
// core waits for memory. 2048 bytes left a fifth to a third of the time to waiting.
constexpr int64_t kAhead = 8192;  // bytes

void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}
Bytes load(const void* p) {
  return _mm512_loadu_si512(p);
}
void store(int32_t* p, Sums x) {
  _mm512_storeu_si512(p, x);
}
Bytes fill(int x) {
  return _mm512_set1_epi8(static_cast<char>(x));
}
Bytes table_of(const uint8_t* places) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(places)));
}
Bytes four(const int8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}
Bytes both(Bytes a, Bytes b) {
  return _mm512_and_si512(a, b);
}
// Bits of the neighbouring byte come along: who shifts takes them away.
template <int kBits>
Bytes right(Bytes x) {
  return _mm512_srli_epi16(x, kBits);
}
template <int kBits>
Bytes left(Bytes x) {
  return _mm512_slli_epi16(x, kBits);
}
// Bits 0, 1, 4 and 5 of the pairs, the others of raw.
Bytes merge(Bytes pairs, Bytes raw) {
  return _mm512_ternarylogic_epi32(fill(0x33), pairs, raw, 0xca);
}
// Bits that an odd number of the three have.
Bytes odd_of(Bytes a, Bytes b, Bytes c) {
  return _mm512_ternarylogic_epi32(a, b, c, 0x96);
}
Bytes lookup(Bytes table, Bytes index) {
  return _mm512_shuffle_epi8(table, index);
}
Bytes where_bit(Bytes bits, int bit, Bytes a, Bytes b) {
  return _mm512_mask_blend_epi8(_mm512_test_epi8_mask(bits, fill(bit)), b, a);
}
Sums dot(Sums sums, Bytes values, Bytes x) {
  return _mm512_dpbusd_epi32(sums, values, x);
}

}  // namespace

#include "isa/sketch.inc"

}  // namespace csfast::avx512
