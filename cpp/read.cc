#include "csfast/read.h"

#include <omp.h>

#include <stdexcept>
#include <string>

namespace csfast {
namespace {

constexpr int64_t kVectorBytes = 16;
constexpr int64_t kMostBytes = int64_t{1} << 36;  // vectors are counted in 32 bits
// Read by a thread at the same time: one alone does not keep the memory busy. One core, 100 MB at a
// time: 4 streams 42 GB/s, 1 stream 32, 4 and 8 with lines asked for ahead 39 and 36 (AMD EPYC,
// 2026-11-30), whatever the width of a load.
constexpr int64_t kStreams = 4;

void check(const ReadParams& p) {
  const auto refuse = [](const std::string& given, const std::string& wanted) {
    throw std::invalid_argument("[read] " + given + ": want " + wanted + ".");
  };
  if (p.n_spans < 1 || p.n_spans > kMaxSpans) {
    refuse(std::to_string(p.n_spans) + " buffers", "1 to " + std::to_string(kMaxSpans));
  }
  for (int i = 0; i < p.n_spans; ++i) {
    const std::string which = "buffer " + std::to_string(i);
    const auto past =
        static_cast<int64_t>(reinterpret_cast<uintptr_t>(p.span[i].data)) % kVectorBytes;
    if (past != 0) {
      refuse(which + " begins " + std::to_string(past) + " bytes past a multiple of 16",
             "an address that is one");
    }
    const int64_t bytes = p.span[i].bytes;
    if (bytes < kVectorBytes || bytes >= kMostBytes || bytes % kVectorBytes != 0) {
      refuse(which + " of " + std::to_string(bytes) + " bytes",
             "a multiple of 16 from 16 to below 2^36");
    }
  }
}

uint32_t sum_of(const uint32_t* word, int64_t n) {
  const int64_t part = n / kStreams;
  uint32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < part; ++k) {
    sum += word[k] + word[part + k] + word[2 * part + k] + word[3 * part + k];
  }
  for (int64_t k = kStreams * part; k < n; ++k) sum += word[k];
  return sum;
}

void read_on_cpu(const ReadParams& p) {
  uint32_t sum = 0;
#pragma omp parallel reduction(+ : sum)
  {
    const int64_t n_threads = omp_get_num_threads();
    const int64_t thread = omp_get_thread_num();
    for (int i = 0; i < p.n_spans; ++i) {
      const auto* word = static_cast<const uint32_t*>(p.span[i].data);
      const int64_t n = p.span[i].bytes / int64_t{sizeof *word};
      const int64_t first = n * thread / n_threads;
      sum += sum_of(word + first, n * (thread + 1) / n_threads - first);
    }
  }
  *p.sum = sum;
}

}  // namespace

int64_t read_sums(Device device) {
  return device == Device::kCuda ? cuda::read_sums() : 1;
}

void read(const ReadParams& p, Device device, Stream stream) {
  check(p);
  device == Device::kCuda ? cuda::read(p, stream) : read_on_cpu(p);
}

}  // namespace csfast
