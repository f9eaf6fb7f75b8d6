// Times products with coded matrices on the CPU without Python, beside the same matrices in
// bfloat16, one by one and as a token goes through all of a model; and what coding a matrix takes.
//
//   cmake -B build && cmake --build build && build/bench/bench_sketch [--quick] [--json]
//                                                                     [--commit HASH]
//
// Memory bounds them. So reading as many bytes and nothing else takes its turn among them, and
// every time is given as a fraction of the bandwidth that it finds; a fraction above 1 fails the
// run. Weights and codes come in turns from 256 MiB and more that no cache holds. Codes are random:
// what they stand for is of no account, and none is simpler than another. The rotation of the input
// is part of every product.
//
// Cases are those of matrices.inc; variants take turns; medians are shown. A quick run is to see
// that all of it runs: it reads from caches.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "csfast/encode.h"
#include "csfast/isa.h"
#include "csfast/linear.h"
#include "csfast/read.h"
#include "csfast/sketch.h"
#include "matrices.h"
#include "memory.h"
#include "results.h"
#include "turns.h"

namespace {

using csfast::Device;
using csfast::bench::kPassParts;
using csfast::bench::Lines;
using csfast::bench::Matrix;
using csfast::bench::n_levels_of;
using csfast::bench::Pass;
using csfast::bench::Shape;
using csfast::bench::text_of;
using csfast::bench::Timing;

constexpr int64_t kMiB = 1 << 20;
constexpr int64_t kBatchMost = 16;

// Memory of which every call takes the next part, so that nothing is read again before all has
// been.
class Ring {
 public:
  explicit Ring(const Lines<uint8_t>& store) : store_(store) {}
  const uint8_t* next(int64_t bytes) {
    if (at_ + bytes > store_.size()) at_ = 0;
    const uint8_t* found = store_.data() + at_;
    at_ += (bytes + 63) / 64 * 64;
    return found;
  }

 private:
  const Lines<uint8_t>& store_;
  int64_t at_ = 0;
};

// The rotation of an input.
struct Turned {
  std::vector<uint32_t> words;
};

// What all products read and write.
class World {
 public:
  // Of the largest matrix a call reads this many bytes, so that `turned` bytes lie between two
  // readings of one.
  World(int64_t turned, int64_t largest)
      : codes_store_(turned + largest), weights_store_(turned + largest) {
    std::mt19937_64 random(0);
    for (int64_t i = 0; i + 8 <= codes_store_.size(); i += 8) {
      const uint64_t bits = random();
      std::memcpy(codes_store_.data() + i, &bits, sizeof bits);
    }
    // A table of normal numbers, entered anywhere for every piece: a draw for each weight takes
    // minutes.
    std::normal_distribution<float> normal;
    std::vector<uint16_t> table(1 << 16);
    for (uint16_t& value : table) value = csfast::bench::bf16(0.02f * normal(random));
    for (int64_t i = 0; i < weights_store_.size(); i += 4096) {
      const int64_t bytes = std::min<int64_t>(4096, weights_store_.size() - i);
      std::memcpy(weights_store_.data() + i, &table[random() % (table.size() - 2048)], bytes);
    }
    x_ = Lines<float>(kBatchMost * kColsMost);
    for (float& value : x_) value = normal(random);
  }

  // Products with the next matrix of the ring.
  void multiply(const Shape& s, std::string_view bits, int64_t batch) {
    bits.empty() ? linear(s, batch) : sketch(s, bits, batch);
  }

  void read(int64_t bytes) {
    const csfast::Span span = {weights_.next(bytes), bytes / 16 * 16};
    csfast::read({.span = &span, .n_spans = 1, .sum = &sum_}, Device::kCpu, nullptr);
  }

 private:
  static constexpr int64_t kColsMost = 8192, kRowsMost = 49152;
  static constexpr size_t kTurned = 128;  // rotations of a width: more than a model has matrices

  void linear(const Shape& s, int64_t batch) {
    csfast::linear({.w = weights_.next(s.rows * s.cols * 2),
                    .bias = nullptr,
                    .x = x_.data(),
                    .work = z_.data(),
                    .y = y_.data(),
                    .batch = batch,
                    .rows = s.rows,
                    .cols = s.cols,
                    .dtype = csfast::DType::kBF16},
                   Device::kCpu, nullptr);
  }

  void sketch(const Shape& s, std::string_view bits, int64_t batch) {
    const Turned& turned = turned_of(s.cols);
    csfast::SketchParams p{};
    p.n_levels = n_levels_of(bits);
    for (int l = 0; l < p.n_levels; ++l) {
      const std::string_view level = bits.substr(2 * l, 1);
      p.level[l] = {.codes = codes_.next(csfast::bench::matrix_bytes(s, level)),
                    .step = reinterpret_cast<const uint16_t*>(steps_.next(s.rows * 2)),
                    .bits = csfast::bench::bits_of(level, 0)};
    }
    p.turn = turned.words.data();
    p.x = x_.data();
    p.z = z_.data();
    p.q = q_.data();
    p.scale = scale_;
    p.y = y_.data();
    p.batch = batch;
    p.rows = s.rows;
    p.cols = s.cols;
    p.dtype = csfast::DType::kF32;
    csfast::sketch(p, Device::kCpu, nullptr);
  }

  // The next rotation of a width.
  const Turned& turned_of(int64_t cols) {
    for (Rotations& of : rotations_) {
      if (of.cols == cols) return of.turned[of.next++ % of.turned.size()];
    }
    Rotations made{cols, 0, std::vector<Turned>(kTurned)};
    std::mt19937 random(1);
    for (Turned& turned : made.turned) {
      turned.words.resize(cols);
      std::iota(turned.words.begin(), turned.words.end(), 0);
      std::shuffle(turned.words.begin(), turned.words.end(), random);
      for (uint32_t& word : turned.words) word |= random() % 2 == 0 ? 0x3f800000u : 0xbf800000u;
    }
    rotations_.push_back(std::move(made));
    return rotations_.back().turned[rotations_.back().next++];
  }

  struct Rotations {
    int64_t cols;
    size_t next;
    std::vector<Turned> turned;
  };

  Lines<uint8_t> codes_store_, weights_store_;
  Ring codes_{codes_store_}, weights_{weights_store_}, steps_{weights_store_};
  std::vector<Rotations> rotations_;
  Lines<float> x_, z_{kBatchMost * kColsMost}, y_{kBatchMost * kRowsMost};
  Lines<int8_t> q_{kBatchMost * csfast::sketch_width(kColsMost)};
  float scale_[kBatchMost];
  uint32_t sum_ = 0;
};

// Bytes of one product: weights or codes, steps, the rotation and the inputs.
double bytes_of(const Shape& s, std::string_view bits, int64_t batch) {
  const int64_t coded = bits.empty() ? 0 : n_levels_of(bits) * s.rows * 2 + s.cols * 5;
  return static_cast<double>(csfast::bench::matrix_bytes(s, bits) + coded + batch * s.cols * 4);
}

struct Variant {
  std::string case_name;
  int64_t batch;
  double bytes;
  std::function<void()> call;
  std::vector<double> seconds = {};
};

struct MatrixRow {
  std::string of;
  std::string variant;  // "sketch", "linear" or "encode"
  int64_t batch;
  Timing timing;
  double bytes;           // that a call has to read
  double dense;           // seconds of the same matrices in bfloat16, by `linear`, one row
  double read_bandwidth;  // bytes a second, measured in turns with the row; 0 if nothing was

  const char* name() const { return of.c_str(); }
  double fraction() const {
    return read_bandwidth > 0 ? bytes / timing.median / read_bandwidth : 0;
  }
  double ratio() const { return dense / timing.median; }
};

std::string to_text(const MatrixRow& row) {
  std::string text = text_of("%-48s %10.2f us (%.2f .. %.2f)", row.name(), row.timing.median * 1e6,
                             row.timing.p10 * 1e6, row.timing.p90 * 1e6);
  if (row.read_bandwidth <= 0) return text;
  return text + text_of("  %.2f of read bandwidth  linear %.1f us  %.2fx", row.fraction(),
                        row.dense * 1e6, row.ratio());
}

std::string to_json(const MatrixRow& row) {
  std::string text = text_of(
      "{\"case\": \"%s\", \"variant\": \"%s\", \"batch\": %lld, \"median_us\": %.3f, "
      "\"p10_us\": %.3f, \"p90_us\": %.3f",
      row.name(), row.variant.c_str(), static_cast<long long>(row.batch), row.timing.median * 1e6,
      row.timing.p10 * 1e6, row.timing.p90 * 1e6);
  if (row.read_bandwidth > 0) {
    text += text_of(
        ", \"bytes\": %.0f, \"fraction_of_read_bandwidth\": %.4f, "
        "\"baselines\": {\"csfast linear\": %.3f}, \"ratio_vs_best\": %.4f",
        row.bytes, row.fraction(), row.dense * 1e6, row.ratio());
  }
  return text + "}";
}

// Times variants, the first of which is the matrices themselves on one row, beside reading
// `read_bytes`, and adds their rows. Gives the bytes a second that reading found.
double measure(World& world, std::vector<Variant> variants, int64_t read_bytes, int runs,
               std::vector<MatrixRow>& rows) {
  variants.push_back({"read", 1, static_cast<double>(read_bytes),
                      [&world, read_bytes] { world.read(read_bytes); }});
  csfast::bench::take_turns(variants, runs, [](const Variant& v, size_t) { v.call(); });
  const Timing read = csfast::bench::timing_of(variants.back().seconds);
  const double bandwidth = variants.back().bytes / read.median;
  const double dense = csfast::bench::timing_of(variants.front().seconds).median;
  variants.pop_back();
  for (const Variant& v : variants) {
    rows.push_back({.of = v.case_name,
                    .variant = v.case_name.substr(0, v.case_name.find(' ')),
                    .batch = v.batch,
                    .timing = csfast::bench::timing_of(v.seconds),
                    .bytes = v.bytes,
                    .dense = dense,
                    .read_bandwidth = bandwidth});
  }
  return bandwidth;
}

Variant variant_of(World& world, const Matrix& m) {
  const Shape s = {m.rows, m.cols};
  return {m.name, m.batch, bytes_of(s, m.bits, m.batch),
          [&world, s, &m] { world.multiply(s, m.bits, m.batch); }};
}

Variant variant_of(World& world, const Pass& pass, int layers) {
  double bytes = 0;
  for (int i = 0; i < kPassParts; ++i) {
    const int times = i + 1 < kPassParts ? layers : 1;
    bytes += times * bytes_of(csfast::bench::kPassShapes[i], pass.bits[i], pass.batch);
  }
  return {pass.name, pass.batch, bytes, [&world, &pass, layers] {
            const auto part = [&](int i) {
              world.multiply(csfast::bench::kPassShapes[i], pass.bits[i], pass.batch);
            };
            for (int layer = 0; layer < layers; ++layer) {
              for (int i = 0; i + 1 < kPassParts; ++i) part(i);
            }
            part(kPassParts - 1);
          }};
}

// What coding a matrix takes, of normal weights and a feedback that every column feels.
MatrixRow encoded(const Matrix& m, int runs) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  const int bits = csfast::bench::bits_of(m.bits, 0);
  Lines<float> w(m.rows * m.cols), feedback(m.cols * m.cols), step(m.rows);
  for (float& value : w) value = normal(random);
  for (int64_t r = 0; r < m.cols; ++r) {
    for (int64_t c = 0; c < m.cols; ++c) {
      const float spread = c > r ? 0.02f * normal(random) : 0.0f;
      feedback.data()[r * m.cols + c] = c == r ? 1.0f : spread;
    }
  }
  for (float& value : step) value = 1.0f / 32;
  std::vector<int8_t> table;
  for (int i = 0; i < 2 << bits; ++i) table.push_back(csfast::trellis_value(bits, i));
  Lines<uint8_t> codes(csfast::bench::matrix_bytes({m.rows, m.cols}, m.bits));
  Lines<int8_t> value(m.rows * m.cols);
  Lines<uint8_t> workspace(csfast::encode_workspace(m.rows, m.cols, Device::kCpu));
  std::vector<double> seconds;
  for (int run = 0; run < runs; ++run) {
    seconds.push_back(csfast::bench::seconds_of([&] {
      csfast::encode({.w = w.data(),
                      .feedback = feedback.data(),
                      .step = step.data(),
                      .table = table.data(),
                      .codes = codes.data(),
                      .value = value.data(),
                      .workspace = workspace.data(),
                      .rows = m.rows,
                      .cols = m.cols,
                      .bits = bits,
                      .nu = csfast::kTrellisMemoryMax},
                     Device::kCpu, nullptr);
    }));
  }
  const std::string sizes = std::string(m.name).substr(std::string(m.name).find(' '));
  return {.of = "encode" + sizes,
          .variant = "encode",
          .batch = 1,
          .timing = csfast::bench::timing_of(seconds),
          .bytes = 0,
          .dense = 0,
          .read_bandwidth = 0};
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
      std::fprintf(stderr, "usage: bench_sketch [--quick] [--json] [--commit HASH]\n");
      return 2;
    }
  }
  const std::span<const Matrix> matrices =
      quick ? std::span<const Matrix>(csfast::bench::kQuickMatrices)
            : std::span<const Matrix>(csfast::bench::kMatrices);
  // The head in bfloat16 is the largest, 54 MiB.
  World world(quick ? kMiB : 256 * kMiB, 64 * kMiB);
  std::vector<MatrixRow> rows;
  double bandwidth = 0;
  for (size_t first = 0, end = 0; first < matrices.size(); first = end) {
    std::vector<Variant> variants;
    const auto is_alike = [&](const Matrix& m) {
      return m.rows == matrices[first].rows && m.cols == matrices[first].cols;
    };
    for (; end < matrices.size() && is_alike(matrices[end]); ++end) {
      variants.push_back(variant_of(world, matrices[end]));
    }
    const int64_t bytes = matrices[first].rows * matrices[first].cols * 2;
    bandwidth = std::max(bandwidth, measure(world, variants, bytes, quick ? 3 : 60, rows));
  }
  std::vector<Variant> passes;
  for (const Pass& pass : csfast::bench::kPasses) {
    passes.push_back(variant_of(world, pass, quick ? 1 : csfast::bench::kPassLayers));
  }
  bandwidth = std::max(bandwidth, measure(world, passes, 64 * kMiB, quick ? 1 : 20, rows));
  rows.push_back(encoded(csfast::bench::kEncoded, quick ? 1 : 5));

  if (json) {
    using csfast::bench::quoted;
    std::vector<std::string> lines;
    for (const MatrixRow& row : rows) lines.push_back(to_json(row));
    csfast::bench::print_json({.command = csfast::bench::command_of(argc, argv),
                               .commit = commit,
                               .machine = {{"device", "\"cpu\""},
                                           {"cpu", quoted(csfast::bench::cpu_name())},
                                           {"threads", std::to_string(omp_get_max_threads())},
                                           {"isa", quoted(csfast::isa())}},
                               .versions = {{"compiler", quoted(__VERSION__)}}},
                              bandwidth, lines);
  } else {
    std::printf("%s, read bandwidth %.1f GB/s\n", csfast::isa(), bandwidth / 1e9);
    for (const MatrixRow& row : rows) std::printf("%s\n", to_text(row).c_str());
  }
  return quick || csfast::bench::too_fast(rows) == 0 ? 0 : 1;
}
