// Times a feed-forward layer on the CPU without Python: select, execute and both, at two densities,
// beside the same kernel on all neurons. What bounds all of them is the memory, so the read
// bandwidth is measured in the same run and every time is given as a fraction of it.
//
//   cmake -B build && cmake --build build && build/bench/bench_ffn [--quick] [--json]
//
// Layers rotate so that no cache holds them; variants take turns; medians are shown.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "csfast/ffn.h"
#include "csfast/recover.h"
#include "csfast/sense.h"

namespace {

using csfast::Device;

struct Sizes {
  int64_t d, n_neurons;
  int layers;  // rotated
  int runs;    // measurements of every variant
};

constexpr csfast::Code kCode = csfast::Code::kBits2;
constexpr int64_t kSliceBytes = 32 << 20;
constexpr int kSlices = 16;  // take turns: 512 MB, more than any cache holds

uint16_t bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // half to even
}

// Memory that starts where a cache line does, as the workspaces want it.
template <typename T>
class Lines {
 public:
  explicit Lines(int64_t size) : store_(size * sizeof(T) / sizeof(Line) + 1) {}
  T* data() { return reinterpret_cast<T*>(store_.data()); }

 private:
  struct alignas(64) Line {
    unsigned char bytes[64];
  };
  std::vector<Line> store_;
};

struct Layer {
  std::vector<uint8_t> codes;    // (n_neurons, 2, groups, group_bytes)
  std::vector<float> equal;      // (d)
  std::vector<float> row_scale;  // (n_neurons, 2)
  std::vector<uint16_t> gate;    // (n_neurons, d), bf16
  std::vector<uint16_t> up;      // (n_neurons, d), bf16
  std::vector<uint16_t> down_t;  // (n_neurons, d), bf16
  std::vector<uint16_t> x;       // (1, d), bf16
  float threshold = 0;           // for the density that is measured
  std::vector<int32_t> tile;     // (1, n_neurons)
  int32_t n_tiles = 0;
};

Layer random_layer(const Sizes& s, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Layer layer;
  layer.codes.resize(s.n_neurons * 2 * csfast::row_bytes(s.d, kCode));
  for (uint8_t& byte : layer.codes) byte = static_cast<uint8_t>(random());
  layer.equal.assign(s.d, 1.0f);
  layer.row_scale.assign(s.n_neurons * 2, 1.0f / std::sqrt(static_cast<float>(s.d)));
  // A table of normal numbers, entered anywhere for every row: a draw for each weight takes
  // minutes.
  std::vector<uint16_t> table(1 << 16);
  const float spread = 1.0f / std::sqrt(static_cast<float>(s.d));
  for (uint16_t& value : table) value = bf16(spread * normal(random));
  for (std::vector<uint16_t>* weight : {&layer.gate, &layer.up, &layer.down_t}) {
    weight->resize(s.n_neurons * s.d);
    for (int64_t j = 0; j < s.n_neurons; ++j) {
      const uint32_t entry = random();
      for (int64_t c = 0; c < s.d; ++c) (*weight)[j * s.d + c] = table[(entry + c) % table.size()];
    }
  }
  for (int64_t c = 0; c < s.d; ++c) layer.x.push_back(bf16(normal(random)));
  layer.tile.resize(s.n_neurons);
  return layer;
}

csfast::SelectParams select_params(const Sizes& s, Layer& layer, void* workspace) {
  return {layer.codes.data(),
          layer.equal.data(),
          layer.row_scale.data(),
          &layer.threshold,
          layer.x.data(),
          workspace,
          layer.tile.data(),
          &layer.n_tiles,
          nullptr,
          1,
          s.d,
          s.n_neurons,
          kCode,
          1,
          csfast::DType::kBF16};
}

// Sets the threshold that keeps `density` of the neurons, and the tile list that goes with it.
void set_density(const Sizes& s, Layer& layer, double density, void* workspace) {
  std::vector<int8_t> q(csfast::q_width(s.d));
  std::vector<int32_t> y(s.n_neurons * 2), index(s.n_neurons);
  std::vector<float> usage(s.n_neurons);
  float scale = 0, missed = 0;
  int32_t count = 0;
  const int32_t budget = std::max<int32_t>(1, std::lround(density * s.n_neurons));
  csfast::sense({layer.codes.data(), layer.equal.data(), layer.x.data(), q.data(), y.data(), &scale,
                 1, s.d, s.n_neurons, kCode, csfast::DType::kBF16},
                Device::kCpu, nullptr);
  csfast::recover({y.data(), &scale, layer.row_scale.data(), nullptr, &budget, usage.data(),
                   index.data(), &count, &missed, 1, s.n_neurons, csfast::Rule::kTopK},
                  Device::kCpu, nullptr);
  layer.threshold = INFINITY;
  for (int32_t i = 0; i < count; ++i) layer.threshold = std::min(layer.threshold, usage[index[i]]);
  csfast::select(select_params(s, layer, workspace), Device::kCpu, nullptr);
}

double seconds_of(const std::function<void()>& call) {
  const auto start = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Bytes a second that all threads read together: the median over slices of about the size that a
// sparse layer reads, so that both meet the scheduler alike. Four streams at once, as one alone
// does not keep the memory busy.
double read_bandwidth() {
  std::vector<int64_t> buffer(kSlices * kSliceBytes / sizeof(int64_t), 1);
  const size_t n = kSliceBytes / sizeof(int64_t);
  std::vector<double> seconds;
  int64_t total = 0;
  for (int i = 0; i < 4 * kSlices; ++i) {
    const int64_t* slice = buffer.data() + i % kSlices * n;
    seconds.push_back(seconds_of([&] {
      int64_t sum = 0;
#pragma omp parallel for simd reduction(+ : sum)
      for (size_t k = 0; k < n / 4; ++k)
        sum += slice[k] + slice[n / 4 + k] + slice[n / 2 + k] + slice[n / 4 * 3 + k];
      total += sum;
    }));
  }
  std::sort(seconds.begin(), seconds.end());
  // Uses the sum, so that no compiler may leave it out.
  return total == 4 * kSlices * static_cast<int64_t>(n) ? kSliceBytes / seconds[seconds.size() / 2]
                                                        : 0;
}

struct Variant {
  std::string name;
  double bytes;  // that a call has to read
  std::function<void(Layer&)> call;
  std::vector<double> seconds = {};

  double quantile(double fraction) {
    std::sort(seconds.begin(), seconds.end());
    return seconds[std::lround(fraction * static_cast<double>(seconds.size() - 1))];
  }
};

void measure(const Sizes& s, std::vector<Layer>& layers, double density, double bandwidth,
             std::vector<std::string>& rows, bool json) {
  Lines<unsigned char> select_space(csfast::select_workspace(1, s.d, s.n_neurons, Device::kCpu));
  Lines<unsigned char> execute_space(csfast::execute_workspace(1, s.d, s.n_neurons, Device::kCpu));
  Lines<unsigned char> ffn_space(csfast::ffn_workspace(1, s.d, s.n_neurons, Device::kCpu));
  std::vector<uint16_t> out(s.d);
  std::vector<int32_t> all(s.n_neurons);
  for (int32_t j = 0; j < s.n_neurons; ++j) all[j] = j;
  const int32_t n_all = static_cast<int32_t>(s.n_neurons);
  for (Layer& layer : layers) set_density(s, layer, density, select_space.data());

  const auto execute = [&](const Layer& layer, const int32_t* tile, const int32_t* n_tiles) {
    csfast::execute(
        {layer.gate.data(), layer.up.data(), layer.down_t.data(), layer.x.data(), tile, n_tiles,
         execute_space.data(), out.data(), 1, s.d, s.n_neurons, 1, csfast::DType::kBF16},
        Device::kCpu, nullptr);
  };
  double kept = 0;
  for (const Layer& layer : layers) kept += layer.n_tiles;
  kept /= static_cast<double>(layers.size());
  const double row = 3.0 * 2.0 * static_cast<double>(s.d);
  const double sensed =
      static_cast<double>(s.n_neurons * (2 * csfast::row_bytes(s.d, kCode) + 8) + s.d * (4 + 2));
  std::vector<Variant> variants = {
      {"complete", sensed + kept * row,
       [&](Layer& layer) {
         csfast::ffn({layer.codes.data(), layer.equal.data(), layer.row_scale.data(),
                      &layer.threshold, layer.gate.data(), layer.up.data(), layer.down_t.data(),
                      layer.x.data(), ffn_space.data(), out.data(), nullptr, 1, s.d, s.n_neurons,
                      kCode, 1, csfast::DType::kBF16},
                     Device::kCpu, nullptr);
       }},
      {"execute", kept * row,
       [&](Layer& layer) { execute(layer, layer.tile.data(), &layer.n_tiles); }},
      {"select", sensed,
       [&](Layer& layer) {
         csfast::select(select_params(s, layer, select_space.data()), Device::kCpu, nullptr);
       }},
      {"all neurons", static_cast<double>(s.n_neurons) * row,
       [&](Layer& layer) { execute(layer, all.data(), &n_all); }},
  };
  constexpr int kWarmup = 2;
  size_t calls = 0;
  for (int turn = -kWarmup; turn < s.runs; ++turn) {
    for (size_t i = 0; i < variants.size(); ++i) {
      Variant& variant = variants[(turn + kWarmup + i) % variants.size()];
      // Every call takes the next layer, or a variant would find what the last one has read.
      Layer& layer = layers[calls++ % layers.size()];
      const double seconds = seconds_of([&] { variant.call(layer); });
      if (turn >= 0) variant.seconds.push_back(seconds);
    }
  }
  const double dense = variants.back().quantile(0.5) * 1e6;
  for (size_t i = 0; i + 1 < variants.size(); ++i) {
    Variant& variant = variants[i];
    const double median = variant.quantile(0.5) * 1e6;
    const double fraction = variant.bytes / (median / 1e6) / bandwidth;
    char text[512];
    std::snprintf(text, sizeof text,
                  json ? "{\"case\": \"ffn d=%lld F=%lld density=.%02d\", \"variant\": \"%s\", "
                         "\"median_us\": %.2f, \"p10_us\": %.2f, \"p90_us\": %.2f, "
                         "\"bytes\": %.0f, \"fraction_of_read_bandwidth\": %.3f, "
                         "\"baselines\": {\"csfast all neurons\": %.2f}, \"ratio_vs_best\": %.3f}"
                       : "ffn d=%lld F=%lld density=.%02d  %-8s  %9.1f us (%.1f .. %.1f)  "
                         "%.0f bytes  %.2f of read bandwidth  all neurons %.1f us  %.2fx",
                  static_cast<long long>(s.d), static_cast<long long>(s.n_neurons),
                  static_cast<int>(std::lround(density * 100)), variant.name.c_str(), median,
                  variant.quantile(0.1) * 1e6, variant.quantile(0.9) * 1e6, variant.bytes, fraction,
                  dense, dense / median);
    rows.push_back(text);
  }
}

}  // namespace

int main(int argc, char** argv) {
  bool json = false, quick = false;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--json") {
      json = true;
    } else if (option == "--quick") {
      quick = true;
    } else {
      std::fprintf(stderr, "usage: bench_ffn [--quick] [--json]\n");
      return 2;
    }
  }
  const Sizes sizes = quick ? Sizes{512, 1024, 2, 3} : Sizes{2048, 8192, 6, 60};
  std::mt19937 random(0);
  std::vector<Layer> layers;
  for (int i = 0; i < sizes.layers; ++i) layers.push_back(random_layer(sizes, random));
  const double bandwidth = read_bandwidth();
  std::vector<std::string> rows;
  for (double density : {0.25, 0.10}) measure(sizes, layers, density, bandwidth, rows, json);

  if (json) {
    std::printf("{\"machine\": {\"device\": \"cpu\", \"read_bandwidth\": %.0f},\n \"rows\": [\n",
                bandwidth);
    for (size_t i = 0; i < rows.size(); ++i)
      std::printf("  %s%s\n", rows[i].c_str(), i + 1 < rows.size() ? "," : "");
    std::printf(" ]}\n");
  } else {
    std::printf("read bandwidth %.1f GB/s\n", bandwidth / 1e9);
    for (const std::string& line : rows) std::printf("%s\n", line.c_str());
  }
  return 0;
}
