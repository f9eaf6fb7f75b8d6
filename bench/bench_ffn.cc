// Times a feed-forward layer on the CPU without Python: select, execute and both, at two densities,
// and execute on blocks of 16 neurons, beside the same kernel on all neurons. What bounds all of
// them is the memory, so plain reading takes its turn among them, and every time is given as a
// fraction of the bandwidth that it finds.
//
//   cmake -B build && cmake --build build && build/bench/bench_ffn [--quick] [--json]
//                                                                     [--commit HASH]
//
// The same on a GPU is bench_ffn.cu.
//
// Layers rotate so that no cache holds them; variants take turns; medians are shown.
#include <omp.h>

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
#include "csfast/isa.h"
#include "csfast/recover.h"
#include "csfast/sense.h"
#include "rows.h"

namespace {

using csfast::Device;
using csfast::bench::Case;
using csfast::bench::kCode;
using csfast::bench::Row;
using csfast::bench::Timing;

struct Sizes : csfast::bench::Shape {
  int runs;  // measurements of every variant
};

constexpr int kBlockRows = 16;  // neurons of a block, for the variant that executes blocks

uint16_t bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // half to even
}

// Memory that starts where a cache line does, as the workspaces want it and tensors have it.
template <typename T>
class Lines {
 public:
  explicit Lines(int64_t size = 0) : size_(size), store_(size * sizeof(T) / sizeof(Line) + 1) {}
  T* data() { return reinterpret_cast<T*>(store_.data()); }
  const T* data() const { return reinterpret_cast<const T*>(store_.data()); }
  int64_t size() const { return size_; }
  T* begin() { return data(); }
  T* end() { return data() + size_; }

 private:
  struct alignas(64) Line {
    unsigned char bytes[64];
  };
  int64_t size_;
  std::vector<Line> store_;
};

struct Layer {
  Lines<uint8_t> codes;          // (n_neurons, 2, groups, group_bytes)
  std::vector<float> equal;      // (d)
  std::vector<float> row_scale;  // (n_neurons, 2)
  Lines<uint16_t> gate;          // (n_neurons, d), bf16
  Lines<uint16_t> up;            // (n_neurons, d), bf16
  Lines<uint16_t> down_t;        // (n_neurons, d), bf16
  Lines<uint16_t> x;             // (1, d), bf16
  float threshold = 0;           // for the density that is measured
  std::vector<int32_t> tile;     // (1, n_neurons)
  int32_t n_tiles = 0;
  std::vector<int32_t> block;  // (1, n_neurons / kBlockRows): of the same density
  int32_t n_blocks = 0;
};

Layer random_layer(const Sizes& s, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Layer layer;
  layer.codes = Lines<uint8_t>(s.n_neurons * 2 * csfast::row_bytes(s.d, kCode));
  for (uint8_t& byte : layer.codes) byte = static_cast<uint8_t>(random());
  layer.equal.assign(s.d, 1.0f);
  layer.row_scale.assign(s.n_neurons * 2, 1.0f / std::sqrt(static_cast<float>(s.d)));
  // A table of normal numbers, entered anywhere for every row: a draw for each weight takes
  // minutes.
  std::vector<uint16_t> table(1 << 16);
  const float spread = 1.0f / std::sqrt(static_cast<float>(s.d));
  for (uint16_t& value : table) value = bf16(spread * normal(random));
  for (Lines<uint16_t>* weight : {&layer.gate, &layer.up, &layer.down_t}) {
    *weight = Lines<uint16_t>(s.n_neurons * s.d);
    for (int64_t j = 0; j < s.n_neurons; ++j) {
      const uint32_t entry = random();
      for (int64_t c = 0; c < s.d; ++c)
        weight->data()[j * s.d + c] = table[(entry + c) % table.size()];
    }
  }
  layer.x = Lines<uint16_t>(s.d);
  for (uint16_t& value : layer.x) value = bf16(normal(random));
  layer.tile.resize(s.n_neurons);
  return layer;
}

csfast::Layer bound(const Sizes& s, const Layer& layer) {
  csfast::Layer bound{};
  bound.form = {.d = s.d,
                .n_neurons = s.n_neurons,
                .dtype = csfast::DType::kBF16,
                .activation = csfast::Activation::kSilu};
  bound.sensor = {.codes = layer.codes.data(),
                  .equal = layer.equal.data(),
                  .row_scale = layer.row_scale.data(),
                  .offset = nullptr,
                  .code = kCode};
  bound.weights.gate = layer.gate.data();
  bound.weights.up = layer.up.data();
  bound.weights.down_t = layer.down_t.data();
  bound.decision.threshold = &layer.threshold;
  bound.decision.tile_rows = 1;
  return bound;
}

csfast::FfnParams ffn_params(const Sizes& s, const Layer& layer, void* workspace, void* out) {
  return {.layer = bound(s, layer),
          .x = layer.x.data(),
          .workspace = workspace,
          .out = out,
          .batch = 1};
}

csfast::SelectParams select_params(const Sizes& s, Layer& layer, void* workspace) {
  return ffn_params(s, layer, nullptr, nullptr)
      .selection(workspace, layer.tile.data(), &layer.n_tiles, nullptr);
}

// Sets the threshold that keeps `density` of the neurons, and the tile list that goes with it.
void set_density(const Sizes& s, Layer& layer, double density, void* workspace) {
  std::vector<int8_t> q(csfast::q_width(s.d));
  std::vector<int32_t> y(s.n_neurons * 2), index(s.n_neurons);
  std::vector<float> usage(s.n_neurons);
  float scale = 0, missed = 0;
  int32_t count = 0;
  csfast::sense({layer.codes.data(), layer.equal.data(), layer.x.data(), q.data(), y.data(), &scale,
                 1, s.d, s.n_neurons, kCode, csfast::DType::kBF16},
                Device::kCpu, nullptr);
  const auto keep_top = [&](int group_rows) {
    const double n_groups = static_cast<double>(csfast::n_groups(s.n_neurons, group_rows));
    const int32_t budget = std::max<int32_t>(1, std::lround(density * n_groups));
    csfast::recover({.y = y.data(),
                     .y_float = nullptr,
                     .scale = &scale,
                     .row_scale = layer.row_scale.data(),
                     .offset = nullptr,
                     .weight = nullptr,
                     .threshold = nullptr,
                     .budget = &budget,
                     .usage = usage.data(),
                     .index = index.data(),
                     .count = &count,
                     .missed = &missed,
                     .batch = 1,
                     .n_neurons = s.n_neurons,
                     .columns = 2,
                     .group_rows = group_rows,
                     .rule = csfast::Rule::kTopK,
                     .activation = csfast::Activation::kSilu},
                    Device::kCpu, nullptr);
  };
  keep_top(kBlockRows);
  layer.block.assign(index.begin(), index.begin() + csfast::n_groups(s.n_neurons, kBlockRows));
  layer.n_blocks = count;
  keep_top(1);
  layer.threshold = INFINITY;
  for (int32_t i = 0; i < count; ++i) layer.threshold = std::min(layer.threshold, usage[index[i]]);
  csfast::select(select_params(s, layer, workspace), Device::kCpu, nullptr);
}

double seconds_of(const std::function<void()>& call) {
  const auto start = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// What all threads together read at once: four streams, as one alone does not keep the memory busy.
// It reads the tables that execute reads, as the speed of memory depends on where the system has
// put it: on one machine other memory was faster by a fifth.
class Reader {
 public:
  void read(const Layer& layer) {
    const Lines<uint16_t>* tables[] = {&layer.gate, &layer.up, &layer.down_t};
    const Lines<uint16_t>& table = *tables[next_++ % 3];
    const uint64_t* words = reinterpret_cast<const uint64_t*>(table.data());
    const size_t quarter = table.size() * sizeof(uint16_t) / sizeof(uint64_t) / 4;
    uint64_t sum = 0;
#pragma omp parallel for simd reduction(+ : sum)
    for (size_t k = 0; k < quarter; ++k) {
      sum += words[k] + words[quarter + k] + words[quarter * 2 + k] + words[quarter * 3 + k];
    }
    total_ = total_ + sum;
  }

 private:
  size_t next_ = 0;
  volatile uint64_t total_ = 0;  // so that no compiler may leave the sums out
};

struct Variant {
  std::string name;
  int block_rows;           // neurons that it reads as one
  double bytes;             // that a call has to read
  int64_t workspace_bytes;  // that a call is given
  std::function<void(Layer&)> call;
  std::vector<double> seconds = {};
};

// Returns the bytes a second that were read in turns with all the rest.
double measure(const Sizes& s, std::vector<Layer>& layers, double density, Reader& reader,
               std::vector<Row>& rows) {
  const int64_t select_bytes = csfast::select_workspace(1, s.d, s.n_neurons, Device::kCpu);
  const int64_t execute_bytes = csfast::execute_workspace(1, s.d, s.n_neurons, Device::kCpu);
  const int64_t ffn_bytes = csfast::ffn_workspace(1, s.d, s.n_neurons, Device::kCpu);
  Lines<unsigned char> select_space(select_bytes);
  Lines<unsigned char> execute_space(execute_bytes);
  Lines<unsigned char> ffn_space(ffn_bytes);
  Lines<uint16_t> out(s.d);
  std::vector<int32_t> all(s.n_neurons);
  for (int32_t j = 0; j < s.n_neurons; ++j) all[j] = j;
  const int32_t n_all = static_cast<int32_t>(s.n_neurons);
  for (Layer& layer : layers) set_density(s, layer, density, select_space.data());

  const auto execute = [&](const Layer& layer, const int32_t* tile, const int32_t* n_tiles,
                           int tile_rows) {
    csfast::ExecuteParams p =
        ffn_params(s, layer, nullptr, out.data()).execution(execute_space.data(), tile, n_tiles);
    p.tile_rows = tile_rows;
    csfast::execute(p, Device::kCpu, nullptr);
  };
  double kept = 0, blocks = 0;
  for (const Layer& layer : layers) {
    kept += layer.n_tiles;
    blocks += layer.n_blocks;
  }
  kept /= static_cast<double>(layers.size());
  blocks /= static_cast<double>(layers.size());
  const Case single = {.d = s.d, .n_neurons = s.n_neurons, .density = density};
  Case blocked = single;
  blocked.block_rows = kBlockRows;
  const double sensed = csfast::bench::select_bytes(single);
  const double executed = csfast::bench::execute_bytes(single, kept);
  // The last two are what the others are measured by.
  std::vector<Variant> variants = {
      {"complete", 1, sensed + executed, ffn_bytes,
       [&](Layer& layer) {
         csfast::ffn(ffn_params(s, layer, ffn_space.data(), out.data()), Device::kCpu, nullptr);
       }},
      {"execute", 1, executed, execute_bytes,
       [&](Layer& layer) { execute(layer, layer.tile.data(), &layer.n_tiles, 1); }},
      {"execute", kBlockRows, csfast::bench::execute_bytes(blocked, blocks), execute_bytes,
       [&](Layer& layer) { execute(layer, layer.block.data(), &layer.n_blocks, kBlockRows); }},
      {"select", 1, sensed, select_bytes,
       [&](Layer& layer) {
         csfast::select(select_params(s, layer, select_space.data()), Device::kCpu, nullptr);
       }},
      {"all neurons", 1, csfast::bench::execute_bytes(single, static_cast<double>(s.n_neurons)),
       execute_bytes, [&](Layer& layer) { execute(layer, all.data(), &n_all, 1); }},
      {"read", 1, static_cast<double>(s.n_neurons * s.d) * sizeof(uint16_t), 0,
       [&](Layer& layer) { reader.read(layer); }},
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
  std::vector<Timing> timings;
  for (const Variant& variant : variants) {
    timings.push_back(csfast::bench::timing_of(variant.seconds));
  }
  const double bandwidth = variants.back().bytes / timings.back().median;
  const double dense = timings[timings.size() - 2].median;
  for (size_t i = 0; i + 2 < variants.size(); ++i) {
    rows.push_back({.of = variants[i].block_rows > 1 ? blocked : single,
                    .variant = variants[i].name,
                    .timing = timings[i],
                    .bytes = variants[i].bytes,
                    .workspace_bytes = variants[i].workspace_bytes,
                    .dense = dense,
                    .read_bandwidth = bandwidth,
                    .executes = variants[i].name != "select"});
  }
  return bandwidth;
}

}  // namespace

int main(int argc, char** argv) {
  bool json = false, quick = false;
  std::string commit;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--json") {
      json = true;
    } else if (option == "--quick") {
      quick = true;
    } else if (option == "--commit" && i + 1 < argc) {
      commit = argv[++i];
    } else {
      std::fprintf(stderr, "usage: bench_ffn [--quick] [--json] [--commit HASH]\n");
      return 2;
    }
  }
  const Sizes sizes = quick ? Sizes{{512, 1024, 2}, 3} : Sizes{csfast::bench::kCpuShape, 60};
  std::mt19937 random(0);
  std::vector<Layer> layers;
  for (int i = 0; i < sizes.layers; ++i) layers.push_back(random_layer(sizes, random));
  Reader reader;
  std::vector<Row> rows;
  double bandwidth = 0;
  for (double density : {0.25, 0.10}) {
    bandwidth = std::max(bandwidth, measure(sizes, layers, density, reader, rows));
  }

  if (json) {
    using csfast::bench::quoted;
    csfast::bench::print_json({.command = csfast::bench::command_of(argc, argv),
                               .commit = commit,
                               .machine = {{"device", "\"cpu\""},
                                           {"cpu", quoted(csfast::bench::cpu_name())},
                                           {"threads", std::to_string(omp_get_max_threads())},
                                           {"isa", quoted(csfast::isa())}},
                               .versions = {{"compiler", quoted(__VERSION__)}}},
                              bandwidth, rows);
  } else {
    std::printf("%s, read bandwidth %.1f GB/s\n", csfast::isa(), bandwidth / 1e9);
    for (const Row& row : rows) std::printf("%s\n", csfast::bench::to_text(row).c_str());
  }
  return 0;
}
