// Linear on any processor.
#include "csfast/linear.h"

#include <cstring>

#include "isa/base/number.h"
#include "loops.h"

namespace csfast::base {
namespace {

struct Sum {
  float lane[16];
};

constexpr int kBatchMost = 2;
constexpr int rows_of(int) {
  return 1;
}

void prefetch(const char*) {}

float sum_of(Sum sum) {
  for (int n = 8; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) sum.lane[i] += sum.lane[i + n];
  }
  return sum.lane[0];
}

template <int kRows>
void sums_of(const Sum (&sum)[kRows], float* total) {
  for (int i = 0; i < kRows; ++i) total[i] = sum_of(sum[i]);
}

struct F32 {
  struct Weights {
    float of[16];
  };
  static constexpr int64_t kSize = 4, kInput = 4, kChannels = 16;
  static Weights load(const char* w, int n = kChannels) {
    Weights found = {};
    std::memcpy(found.of, w, n * kSize);
    return found;
  }
  static Sum add(Sum sum, const Weights& w, const char* x) {
    const Weights by = load(x);
    for (int i = 0; i < 16; ++i) sum.lane[i] += w.of[i] * by.of[i];
    return sum;
  }
  static float value(const void* p, int64_t i) { return static_cast<const float*>(p)[i]; }
};

struct BF16 {
  struct Weights {
    BFloat16 of[32];
  };
  static constexpr int64_t kSize = 2, kInput = 4, kChannels = 32;
  static Weights load(const char* w, int n = kChannels) {
    Weights found = {};
    std::memcpy(found.of, w, n * kSize);
    return found;
  }
  // The odd channels lie before the even ones, as `place` puts them.
  static Sum add(Sum sum, const Weights& w, const char* x) {
    float by[32];
    std::memcpy(by, x, sizeof by);
    for (int i = 0; i < 16; ++i) sum.lane[i] += to_float(w.of[2 * i + 1]) * by[i];
    for (int i = 0; i < 16; ++i) sum.lane[i] += to_float(w.of[2 * i]) * by[16 + i];
    return sum;
  }
  static float value(const void* p, int64_t i) {
    return to_float(static_cast<const BFloat16*>(p)[i]);
  }
};

// 32 channels from c on, rounded, the odd ones first.
void place(const float* x, float* work, int64_t c) {
  for (int i = 0; i < 16; ++i) {
    work[c + i] = to_float(from_float<BFloat16>(x[2 * i + 1]));
    work[c + 16 + i] = to_float(from_float<BFloat16>(x[2 * i]));
  }
}

}  // namespace

#include "isa/linear.inc"

}  // namespace csfast::base
