// Times a feed-forward layer on the CPU without Python: select, execute and both, of neurons one by
// one and in blocks, beside the same kernel on all neurons. What bounds all of them is the memory,
// so reading the very weights and nothing else takes its turn among them, and every time is given
// as a fraction of the bandwidth that it finds. A fraction above 1 fails the run.
//
//   cmake -B build && cmake --build build && build/bench/bench_ffn [--quick] [--json]
//                                                                     [--commit HASH]
//
// The same on a GPU is bench_ffn.cu.
//
// Cases are those of cases.inc. Layers rotate so that no cache holds them; variants take turns;
// medians are shown. A quick run is to see that all of it runs: it reads from caches.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "csfast/ffn.h"
#include "csfast/isa.h"
#include "csfast/read.h"
#include "csfast/recover.h"
#include "csfast/sense.h"
#include "memory.h"
#include "rows.h"
#include "turns.h"

namespace {

using csfast::Device;
using csfast::bench::bf16;
using csfast::bench::Case;
using csfast::bench::kCode;
using csfast::bench::Lines;
using csfast::bench::Row;
using csfast::bench::Timing;

static_assert(csfast::bench::have_no_batches(csfast::bench::kCpuCases));
static_assert(csfast::bench::have_no_batches(csfast::bench::kQuickCases));

struct Layer {
  Lines<uint8_t> codes;          // (n_neurons, 2, groups, group_bytes)
  std::vector<float> equal;      // (d)
  std::vector<float> row_scale;  // (n_neurons, 2)
  Lines<uint16_t> gate;          // (n_neurons, d), bf16
  Lines<uint16_t> up;            // (n_neurons, d), bf16
  Lines<uint16_t> down_t;        // (n_neurons, d), bf16
  Lines<uint16_t> x;             // (1, d), bf16
  float threshold = 0;           // for the case that is measured, as is the list
  std::vector<int32_t> tile;     // (1, n_neurons)
  int32_t n_tiles = 0;
};

Layer random_layer(const Case& s, std::mt19937& random) {
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

csfast::Layer bound(const Case& s, const Layer& layer) {
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
  bound.decision.tile_rows = s.block_rows;
  return bound;
}

csfast::FfnParams ffn_params(const Case& s, const Layer& layer, void* workspace, void* out) {
  return {.layer = bound(s, layer),
          .x = layer.x.data(),
          .workspace = workspace,
          .out = out,
          .batch = 1};
}

csfast::SelectParams select_params(const Case& s, Layer& layer, void* workspace) {
  return ffn_params(s, layer, nullptr, nullptr)
      .selection(workspace, layer.tile.data(), &layer.n_tiles, nullptr);
}

// Sets the threshold that keeps the density of the case, and the list that goes with it.
void set_density(const Case& s, Layer& layer, void* workspace) {
  std::vector<int8_t> q(csfast::q_width(s.d));
  std::vector<int32_t> y(s.n_neurons * 2), index(s.n_neurons);
  std::vector<float> usage(s.n_neurons);
  float scale = 0, missed = 0;
  int32_t count = 0;
  csfast::sense({layer.codes.data(), layer.equal.data(), layer.x.data(), q.data(), y.data(), &scale,
                 1, s.d, s.n_neurons, kCode, csfast::DType::kBF16},
                Device::kCpu, nullptr);
  const auto n_groups = static_cast<double>(csfast::n_groups(s.n_neurons, s.block_rows));
  const int32_t budget = std::max<int32_t>(1, std::lround(s.density * n_groups));
  csfast::recover({.y = y.data(),
                   .y_float = nullptr,
                   .scale = &scale,
                   .row_scale = layer.row_scale.data(),
                   .offset = nullptr,
                   .votes = nullptr,
                   .threshold = nullptr,
                   .budget = &budget,
                   .usage = usage.data(),
                   .index = index.data(),
                   .count = &count,
                   .missed = &missed,
                   .batch = 1,
                   .n_neurons = s.n_neurons,
                   .columns = 2,
                   .group_rows = s.block_rows,
                   .rule = csfast::Rule::kTopK,
                   .activation = csfast::Activation::kSilu},
                  Device::kCpu, nullptr);
  layer.threshold = INFINITY;
  for (int32_t i = 0; i < count; ++i) layer.threshold = std::min(layer.threshold, usage[index[i]]);
  csfast::select(select_params(s, layer, workspace), Device::kCpu, nullptr);
}

struct Variant {
  std::string name;
  double bytes;             // that a call has to read
  int64_t workspace_bytes;  // that a call is given
  std::function<void(Layer&)> call;
  std::vector<double> seconds = {};
};

// Times one case and adds its rows. Gives the bytes a second that were read in turns with all the
// rest.
double measure(const Case& s, std::vector<Layer>& layers, int runs, std::vector<Row>& rows) {
  const int64_t select_bytes = csfast::select_workspace(1, s.d, s.n_neurons, Device::kCpu);
  const int64_t execute_bytes = csfast::execute_workspace(1, s.d, s.n_neurons, Device::kCpu);
  const int64_t ffn_bytes = csfast::ffn_workspace(1, s.d, s.n_neurons, Device::kCpu);
  Lines<unsigned char> select_space(select_bytes);
  Lines<unsigned char> execute_space(execute_bytes);
  Lines<unsigned char> ffn_space(ffn_bytes);
  Lines<uint16_t> out(s.d);
  const int64_t n_groups = csfast::n_groups(s.n_neurons, s.block_rows);
  std::vector<int32_t> all(n_groups);
  for (int32_t j = 0; j < n_groups; ++j) all[j] = j;
  const auto n_all = static_cast<int32_t>(n_groups);
  double kept = 0;
  for (Layer& layer : layers) {
    set_density(s, layer, select_space.data());
    kept += layer.n_tiles / static_cast<double>(layers.size());
  }

  const auto execute = [&](const Layer& layer, const int32_t* tile, const int32_t* n_tiles) {
    csfast::execute(
        ffn_params(s, layer, nullptr, out.data()).execution(execute_space.data(), tile, n_tiles),
        Device::kCpu, nullptr);
  };
  uint32_t sum = 0;
  size_t reads = 0;
  const double sensed = csfast::bench::select_bytes(s);
  const double executed = csfast::bench::execute_bytes(s, kept);
  const int64_t table_bytes = s.n_neurons * s.d * int64_t{sizeof(uint16_t)};
  // The last two are what the others are measured by.
  std::vector<Variant> variants = {
      {"complete", sensed + executed, ffn_bytes,
       [&](Layer& layer) {
         csfast::ffn(ffn_params(s, layer, ffn_space.data(), out.data()), Device::kCpu, nullptr);
       }},
      {"execute", executed, execute_bytes,
       [&](Layer& layer) { execute(layer, layer.tile.data(), &layer.n_tiles); }},
      {"select", sensed, select_bytes,
       [&](Layer& layer) {
         csfast::select(select_params(s, layer, select_space.data()), Device::kCpu, nullptr);
       }},
      {"all neurons", csfast::bench::execute_bytes(s, static_cast<double>(n_groups)), execute_bytes,
       [&](Layer& layer) { execute(layer, all.data(), &n_all); }},
      // One of the three in turns: what takes about as long as the others is as often disturbed.
      {"read", static_cast<double>(table_bytes), 0,
       [&](Layer& layer) {
         const Lines<uint16_t>* tables[] = {&layer.gate, &layer.up, &layer.down_t};
         const csfast::Span span = {tables[reads++ / layers.size() % 3]->data(), table_bytes};
         csfast::read({.span = &span, .n_spans = 1, .sum = &sum}, Device::kCpu, nullptr);
       }},
  };
  // Every call takes the next layer, or a variant would find what the last one has read.
  csfast::bench::take_turns(variants, runs, [&](Variant& variant, size_t calls) {
    variant.call(layers[calls % layers.size()]);
  });
  std::vector<Timing> timings;
  for (const Variant& variant : variants) {
    timings.push_back(csfast::bench::timing_of(variant.seconds));
  }
  const double bandwidth = variants.back().bytes / timings.back().median;
  const double dense = timings[timings.size() - 2].median;
  for (size_t i = 0; i + 2 < variants.size(); ++i) {
    rows.push_back({.of = s,
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
  const std::span<const Case> cases = quick ? std::span<const Case>(csfast::bench::kQuickCases)
                                            : std::span<const Case>(csfast::bench::kCpuCases);
  std::vector<Row> rows;
  double bandwidth = 0;
  csfast::bench::for_shapes(cases, [&](std::span<const Case> alike) {
    std::mt19937 random(0);
    std::vector<Layer> layers;
    for (int i = 0; i < alike[0].layers; ++i) layers.push_back(random_layer(alike[0], random));
    for (const Case& c : alike) {
      bandwidth = std::max(bandwidth, measure(c, layers, quick ? 3 : 60, rows));
    }
  });

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
  return quick || csfast::bench::too_fast(rows) == 0 ? 0 : 1;
}
