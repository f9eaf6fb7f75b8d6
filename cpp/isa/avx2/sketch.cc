// The product of a row tile with AVX2: eight of its sixteen lanes at once.
#include "csfast/sketch.h"

#include <immintrin.h>

#include <bit>
#include <cmath>
#include <cstring>

#include "isa/base/number.h"
#include "loops.h"

namespace csfast::avx2 {
namespace {

using Bytes = __m256i;
using Sums = __m256i;

constexpr int kBytes = 32;
constexpr int kRowsMost = 2;  // of the batch at once: sums of eight registers

// The codes are one stream: what will be read in some 200 ns is asked for, which is more than a
// core waits for memory. 2048 bytes left a fifth to a third of the time to waiting.
constexpr int64_t kAhead = 8192;  // bytes

void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}
Bytes load(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
void store(int32_t* p, Sums x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
}
Bytes fill(int x) {
  return _mm256_set1_epi8(static_cast<char>(x));
}
Bytes table_of(const uint8_t* places) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(places)));
}
Bytes four(const int8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return _mm256_set1_epi32(x);
}
Bytes both(Bytes a, Bytes b) {
  return _mm256_and_si256(a, b);
}
// Bits of the neighbouring byte come along: who shifts takes them away.
template <int kBits>
Bytes right(Bytes x) {
  return _mm256_srli_epi16(x, kBits);
}
template <int kBits>
Bytes left(Bytes x) {
  return _mm256_slli_epi16(x, kBits);
}
// Bits 0, 1, 4 and 5 of the pairs, the others of raw.
Bytes merge(Bytes pairs, Bytes raw) {
  const Bytes mask = fill(0x33);
  return _mm256_or_si256(_mm256_and_si256(mask, pairs), _mm256_andnot_si256(mask, raw));
}
// Bits that an odd number of the three have.
Bytes odd_of(Bytes a, Bytes b, Bytes c) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
Bytes lookup(Bytes table, Bytes index) {
  return _mm256_shuffle_epi8(table, index);
}
Bytes where_bit(Bytes bits, int bit, Bytes a, Bytes b) {
  const Bytes of = fill(bit);
  return _mm256_blendv_epi8(b, a, _mm256_cmpeq_epi8(_mm256_and_si256(bits, of), of));
}
// Two products of at most 127 * 127 stay within int16.
Sums dot(Sums sums, Bytes values, Bytes x) {
  const __m256i pairs = _mm256_maddubs_epi16(values, x);
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

}  // namespace

#include "isa/sketch.inc"

}  // namespace csfast::avx2
