// Times a feed-forward layer on a GPU without Python: select, execute and both, rows of a batch
// with one support. What bounds all of them is the memory, so reading the very weights and nothing
// else takes its turn among them, and every time is given as a fraction of the bandwidth that it
// finds. A fraction above 1 fails the run.
//
//   cmake -B build -DCSFAST_CUDA=ON && cmake --build build
//   build/bench/bench_ffn_cuda [--quick] [--json] [--runs N] [--only TEXT] [--design WORDS]
//                              [--commit HASH]
//
// Cases are those of cases.inc. A measurement is one replay of a CUDA graph with a call for every
// layer. Layers of random weights rotate so that no cache holds them; variants take turns; medians
// are shown. Before a case is timed its list and its outputs are compared with each other.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/device.cuh"
#include "common/launch.cuh"
#include "csfast/ffn.h"
#include "csfast/read.h"
#include "csfast/recover.h"
#include "csfast/sense.h"
#include "rows.h"

namespace {

using csfast::BackendError;
using csfast::Device;
using csfast::bench::Case;
using csfast::bench::kCode;
using csfast::bench::Row;
using csfast::bench::Timing;

constexpr int kThreads = 512;  // of a block of the kernels below
constexpr int kWarmup = 2;     // replays of each graph that do not count

static_assert(csfast::bench::have_no_blocks(csfast::bench::kCudaCases));
static_assert(csfast::bench::have_no_blocks(csfast::bench::kQuickCases));

void want(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  throw BackendError(std::string("[bench] ") + call + " failed: " + cudaGetErrorName(status) +
                     " (" + cudaGetErrorString(status) + ").");
}

// Memory of the device. What cudaMalloc gives starts at a multiple of 256 bytes.
template <typename T>
class Array {
 public:
  Array() = default;
  explicit Array(int64_t size) : size_(size) {
    want(cudaMalloc(&data_, static_cast<size_t>(size) * sizeof(T)), "cudaMalloc");
  }
  explicit Array(const std::vector<T>& values) : Array(static_cast<int64_t>(values.size())) {
    write(values);
  }
  Array(Array&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Array& operator=(Array&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Array() { cudaFree(data_); }

  T* data() const { return static_cast<T*>(data_); }
  int64_t size() const { return size_; }
  void write(const std::vector<T>& values) {
    want(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
         "cudaMemcpy");
    // A copy from pageable memory may return before it has arrived, and streams do not wait for it.
    want(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  // Waits for all work that was given to the device.
  std::vector<T> read(int64_t count) const {
    std::vector<T> values(static_cast<size_t>(count));
    want(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    want(cudaMemcpy(values.data(), data_, values.size() * sizeof(T), cudaMemcpyDeviceToHost),
         "cudaMemcpy");
    return values;
  }
  // Every byte 0xff: not a number in bf16 and float.
  void poison(cudaStream_t stream) const {
    want(cudaMemsetAsync(data_, 0xff, static_cast<size_t>(size_) * sizeof(T), stream),
         "cudaMemsetAsync");
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

// Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014: the i-th
// number of a sequence, in any order.
__device__ __forceinline__ uint64_t random_bits(uint64_t seed, int64_t i) {
  uint64_t z = (seed << 40) + static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

struct NormalParams {
  __nv_bfloat162* out;  // (pairs)
  int64_t pairs;
  float spread;
  uint64_t seed;
};

// Two normal numbers from two uniform ones (Box, Muller 1958).
__global__ void __launch_bounds__(kThreads) normal_kernel(const NormalParams p) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.pairs; i += stride) {
    const uint64_t bits = random_bits(p.seed, i);
    const float one = static_cast<float>((bits >> 40) + 1) * 0x1p-24f;  // in (0, 1]
    const float other = static_cast<float>(bits & 0xffffff) * 0x1p-24f;
    const float radius = p.spread * sqrtf(-2.0f * logf(one));
    float sine, cosine;
    sincospif(2.0f * other, &sine, &cosine);
    p.out[i] = __floats2bfloat162_rn(radius * cosine, radius * sine);
  }
}

struct BitsParams {
  uint64_t* out;  // (words)
  int64_t words;
  uint64_t seed;
};

__global__ void __launch_bounds__(kThreads) bits_kernel(const BitsParams p) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.words; i += stride) {
    p.out[i] = random_bits(p.seed, i);
  }
}

struct ClockParams {
  int64_t* ticks;  // (2), written: of the processor, and nanoseconds
};

// Runs for a millisecond. The timer of the device advances in steps of at most a microsecond.
__global__ void __launch_bounds__(1) clock_kernel(const ClockParams p) {
  const auto now = [] {
    int64_t nanoseconds;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
    return nanoseconds;
  };
  const int64_t begin = now();
  const int64_t first = clock64();
  int64_t passed = 0;
  while (passed < 1'000'000) passed = now() - begin;
  p.ticks[0] = clock64() - first;
  p.ticks[1] = passed;
}

int attribute(cudaDeviceAttr which) {
  int value = 0;
  want(cudaDeviceGetAttribute(&value, which, 0), "cudaDeviceGetAttribute");
  return value;
}

// Blocks of kThreads that fill the machine.
unsigned full_grid() {
  return static_cast<unsigned>(attribute(cudaDevAttrMultiProcessorCount) *
                               attribute(cudaDevAttrMaxThreadsPerMultiProcessor) / kThreads);
}

void fill_normal(const Array<__nv_bfloat16>& out, float spread, uint64_t seed, cudaStream_t on) {
  csfast::cuda::launch("bench", "normal", normal_kernel, dim3(full_grid()), dim3(kThreads), on,
                       NormalParams{.out = reinterpret_cast<__nv_bfloat162*>(out.data()),
                                    .pairs = out.size() / 2,
                                    .spread = spread,
                                    .seed = seed});
}

void fill_bits(void* out, int64_t bytes, uint64_t seed, cudaStream_t on) {
  csfast::cuda::launch("bench", "bits", bits_kernel, dim3(full_grid()), dim3(kThreads), on,
                       BitsParams{.out = static_cast<uint64_t*>(out),
                                  .words = bytes / int64_t{sizeof(uint64_t)},
                                  .seed = seed});
}

class Stream {
 public:
  Stream() { want(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate"); }
  Stream(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(stream_); }
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// What `work` puts on the stream, to be put there again.
class Graph {
 public:
  Graph(cudaStream_t stream, const std::function<void()>& work) {
    work();  // outside of the graph: a kernel is loaded when it runs first
    want(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    cudaGraph_t graph = nullptr;
    want(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
         "cudaStreamBeginCapture");
    work();
    want(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    want(cudaGraphInstantiate(&graph_, graph, 0), "cudaGraphInstantiate");
    want(cudaGraphDestroy(graph), "cudaGraphDestroy");
  }
  Graph(Graph&& other) noexcept : graph_(std::exchange(other.graph_, nullptr)) {}
  ~Graph() {
    if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
  }
  void replay(cudaStream_t stream) const {
    want(cudaGraphLaunch(graph_, stream), "cudaGraphLaunch");
  }

 private:
  cudaGraphExec_t graph_ = nullptr;
};

class Stopwatch {
 public:
  Stopwatch() {
    want(cudaEventCreate(&begin_), "cudaEventCreate");
    want(cudaEventCreate(&end_), "cudaEventCreate");
  }
  Stopwatch(const Stopwatch&) = delete;
  ~Stopwatch() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  double seconds_of(const Graph& graph, cudaStream_t stream) {
    want(cudaEventRecord(begin_, stream), "cudaEventRecord");
    graph.replay(stream);
    want(cudaEventRecord(end_, stream), "cudaEventRecord");
    want(cudaEventSynchronize(end_), "cudaEventSynchronize");
    float milliseconds = 0;
    want(cudaEventElapsedTime(&milliseconds, begin_, end_), "cudaEventElapsedTime");
    return milliseconds / 1e3;
  }

 private:
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

struct Layer {
  Array<uint8_t> codes;         // (n_neurons, 2, groups, group_bytes)
  Array<float> equal;           // (d)
  Array<float> row_scale;       // (n_neurons, 2)
  Array<__nv_bfloat16> gate;    // (n_neurons, d)
  Array<__nv_bfloat16> up;      // (n_neurons, d)
  Array<__nv_bfloat16> down_t;  // (n_neurons, d)
  Array<__nv_bfloat16> x;       // (batch_max, d)
  Array<__nv_bfloat16> out;     // (batch_max, d)
  Array<float> threshold;       // (batch_max), the first for the case that is measured
  Array<int32_t> tile;          // (1, n_neurons)
  Array<int32_t> n_tiles;       // (1)
  int32_t kept = 0;             // neurons: n_tiles on the host
};

Layer random_layer(const Case& s, int64_t batch_max, uint64_t seed, cudaStream_t stream) {
  const float spread = 1.0f / std::sqrt(static_cast<float>(s.d));
  Layer layer;
  layer.codes = Array<uint8_t>(s.n_neurons * 2 * csfast::row_bytes(s.d, kCode));
  fill_bits(layer.codes.data(), layer.codes.size(), 8 * seed, stream);
  layer.equal = Array<float>(std::vector<float>(s.d, 1.0f));
  layer.row_scale = Array<float>(std::vector<float>(2 * s.n_neurons, spread));
  uint64_t part = 8 * seed;
  for (Array<__nv_bfloat16>* weight : {&layer.gate, &layer.up, &layer.down_t}) {
    *weight = Array<__nv_bfloat16>(s.n_neurons * s.d);
    fill_normal(*weight, spread, ++part, stream);
  }
  layer.x = Array<__nv_bfloat16>(batch_max * s.d);
  fill_normal(layer.x, 1.0f, ++part, stream);
  layer.out = Array<__nv_bfloat16>(batch_max * s.d);
  layer.threshold = Array<float>(batch_max);
  layer.tile = Array<int32_t>(s.n_neurons);
  layer.n_tiles = Array<int32_t>(1);
  return layer;
}

// The operations on the layers of one shape, by their public parameters. Fields that are not named
// are left at zero: null or the default.
class Operations {
 public:
  Operations(const Case& s, int64_t batch_max, const csfast::Design& design, cudaStream_t stream)
      : design_(design),
        stream_(stream),
        weight_(std::vector<float>(batch_max, 1.0f)),
        q_(batch_max * csfast::q_width(s.d)),
        y_(batch_max * s.n_neurons * 2),
        scale_(batch_max),
        usage_(s.n_neurons),
        index_(s.n_neurons),
        count_(1),
        missed_(1),
        budget_(1),
        all_(s.n_neurons),
        n_all_(std::vector<int32_t>{static_cast<int32_t>(s.n_neurons)}) {
    std::vector<int32_t> all(s.n_neurons);
    for (int32_t j = 0; j < static_cast<int32_t>(s.n_neurons); ++j) all[j] = j;
    all_.write(all);
    const auto most = [&](int64_t (*bytes)(int64_t, int64_t, int64_t, Device)) {
      return Array<unsigned char>(bytes(batch_max, s.d, s.n_neurons, Device::kCuda));
    };
    select_space_ = most(csfast::select_workspace);
    execute_space_ = most(csfast::execute_workspace);
    ffn_space_ = most(csfast::ffn_workspace);
  }

  void select(const Case& c, const Layer& layer) const {
    csfast::select(params(c, layer).selection(select_space_.data(), layer.tile.data(),
                                              layer.n_tiles.data(), nullptr),
                   Device::kCuda, stream_);
  }

  void execute(const Case& c, const Layer& layer) const {
    execute(c, layer, layer.tile.data(), layer.n_tiles.data());
  }

  void execute_all(const Case& c, const Layer& layer) const {
    execute(c, layer, all_.data(), n_all_.data());
  }

  void ffn(const Case& c, const Layer& layer) const {
    csfast::ffn(params(c, layer), Device::kCuda, stream_);
  }

  // Sets the threshold that keeps the density of the case, and the list that goes with it. Throws
  // BackendError if select and recover disagree.
  void set_density(const Case& c, Layer& layer) const {
    const auto n_groups = static_cast<double>(c.n_neurons);
    const auto budget = static_cast<int32_t>(std::max(1L, std::lround(c.density * n_groups)));
    budget_.write({budget});
    csfast::SenseParams sense{};
    sense.codes = layer.codes.data();
    sense.equal = layer.equal.data();
    sense.x = layer.x.data();
    sense.q = q_.data();
    sense.y = y_.data();
    sense.scale = scale_.data();
    sense.batch = c.batch;
    sense.d = c.d;
    sense.n_neurons = c.n_neurons;
    sense.code = kCode;
    sense.dtype = csfast::DType::kBF16;
    csfast::sense(sense, Device::kCuda, stream_);

    csfast::RecoverParams recover{};
    recover.y = y_.data();
    recover.scale = scale_.data();
    recover.row_scale = layer.row_scale.data();
    recover.votes = vote(c);
    recover.budget = budget_.data();
    recover.usage = usage_.data();
    recover.index = index_.data();
    recover.count = count_.data();
    recover.missed = missed_.data();
    recover.batch = c.batch;
    recover.n_neurons = c.n_neurons;
    recover.columns = 2;
    recover.group_rows = 1;
    recover.rule = csfast::Rule::kTopK;
    recover.activation = csfast::Activation::kSilu;
    csfast::recover(recover, Device::kCuda, stream_);

    const std::vector<float> usage = usage_.read(c.n_neurons);
    const std::vector<int32_t> index = index_.read(c.n_neurons);
    const int32_t count = count_.read(1)[0];
    if (count != budget) fail(c, "recover keeps", count, budget);
    float threshold = std::numeric_limits<float>::infinity();
    for (int32_t i = 0; i < count; ++i) threshold = std::min(threshold, usage[index[i]]);
    layer.threshold.write(std::vector<float>(layer.threshold.size(), threshold));
    select(c, layer);
    layer.kept = layer.n_tiles.read(1)[0];
    int32_t wanted = 0;  // more than the budget where usages are equal
    for (const float u : usage) wanted += u >= threshold ? 1 : 0;
    if (layer.kept != wanted) fail(c, "select keeps", layer.kept, wanted);
  }

  // How ffn goes about a case, and what it launches.
  std::string describe(const Case& c, const Layer& layer) const {
    const csfast::FfnParams p = params(c, layer);
    return csfast::to_string(csfast::choose(p, csfast::cuda::chip("bench"))) + ": " +
           csfast::to_string(csfast::cuda::prepare(p));
  }

  // Throws BackendError unless ffn writes what execute does on the list of select.
  void compare(const Case& c, const Layer& layer) const {
    const int64_t n = c.batch * c.d;
    layer.out.poison(stream_);
    execute(c, layer);
    const std::vector<__nv_bfloat16> one = layer.out.read(n);
    layer.out.poison(stream_);
    ffn(c, layer);
    const std::vector<__nv_bfloat16> other = layer.out.read(n);
    // Both round float32 sums of the same terms to bf16 once: to neighbours, 2^-7 apart at most,
    // if rounding in float32, which is far finer, puts the sums on two sides of a boundary.
    float size = 0;
    for (const __nv_bfloat16 value : one) size = std::max(size, std::abs(__bfloat162float(value)));
    for (int64_t i = 0; i < n; ++i) {
      const float a = __bfloat162float(one[i]);
      const float b = __bfloat162float(other[i]);
      if (std::isfinite(a) && std::abs(a - b) <= 0x1p-7f * size) continue;
      throw BackendError("[bench] " + std::string(c.name) + ": output " + std::to_string(i) +
                         " is " + std::to_string(a) + " of execute and " + std::to_string(b) +
                         " of ffn: want the same.");
    }
  }

 private:
  static void fail(const Case& c, const char* what, int32_t found, int32_t wanted) {
    throw BackendError("[bench] " + std::string(c.name) + ": " + what + " " +
                       std::to_string(found) + " neurons: want " + std::to_string(wanted) + ".");
  }

  // Rows of a batch decide together, a single row for itself.
  const float* vote(const Case& c) const { return c.batch > 1 ? weight_.data() : nullptr; }

  csfast::FfnParams params(const Case& c, const Layer& layer) const {
    csfast::FfnParams p{};
    p.layer.form = {.d = c.d,
                    .n_neurons = c.n_neurons,
                    .dtype = csfast::DType::kBF16,
                    .activation = csfast::Activation::kSilu};
    p.layer.sensor = {.codes = layer.codes.data(),
                      .equal = layer.equal.data(),
                      .row_scale = layer.row_scale.data(),
                      .offset = nullptr,
                      .code = kCode};
    p.layer.weights.gate = layer.gate.data();
    p.layer.weights.up = layer.up.data();
    p.layer.weights.down_t = layer.down_t.data();
    p.layer.decision.threshold = layer.threshold.data();
    p.layer.decision.votes = vote(c);
    p.layer.decision.tile_rows = 1;
    p.x = layer.x.data();
    p.workspace = ffn_space_.data();
    p.out = layer.out.data();
    p.batch = c.batch;
    p.design = design_;
    return p;
  }

  void execute(const Case& c, const Layer& layer, const int32_t* tile,
               const int32_t* n_tiles) const {
    csfast::execute(params(c, layer).execution(execute_space_.data(), tile, n_tiles), Device::kCuda,
                    stream_);
  }

  csfast::Design design_;
  cudaStream_t stream_;
  Array<float> weight_;            // (batch_max), ones
  Array<int8_t> q_;                // (batch_max, q_width)
  Array<int32_t> y_;               // (batch_max, n_neurons, 2)
  Array<float> scale_;             // (batch_max)
  Array<float> usage_;             // (1, n_neurons)
  Array<int32_t> index_;           // (1, n_neurons)
  Array<int32_t> count_;           // (1)
  Array<float> missed_;            // (1)
  mutable Array<int32_t> budget_;  // (1)
  Array<int32_t> all_;             // (1, n_neurons): every neuron
  Array<int32_t> n_all_;           // (1)
  Array<unsigned char> select_space_, execute_space_, ffn_space_;
};

// Reads the weights of all layers in as few launches as take them, as a launch has to be long: the
// time of one that reads a small layer is that of its start.
class Reader {
 public:
  Reader(const std::vector<Layer>& layers, cudaStream_t stream)
      : stream_(stream), sums_(csfast::read_sums(Device::kCuda)) {
    for (const Layer& layer : layers) {
      for (const auto* weight : {&layer.gate, &layer.up, &layer.down_t}) {
        spans_.push_back({weight->data(), weight->size() * int64_t{sizeof(__nv_bfloat16)}});
        bytes_ += static_cast<double>(spans_.back().bytes);
      }
    }
  }
  void read_all() const {
    for (size_t first = 0; first < spans_.size(); first += csfast::kMaxSpans) {
      const auto left = static_cast<int>(spans_.size() - first);
      csfast::read({.span = spans_.data() + first,
                    .n_spans = std::min(left, csfast::kMaxSpans),
                    .sum = sums_.data()},
                   Device::kCuda, stream_);
    }
  }
  double bytes() const { return bytes_; }

 private:
  cudaStream_t stream_;
  std::vector<csfast::Span> spans_;
  double bytes_ = 0;
  Array<uint32_t> sums_;  // written and never read
};

struct Variant {
  std::string name;
  double bytes;             // that a call has to read
  int64_t workspace_bytes;  // that a call is given
  int calls;                // in the graph
  Graph graph;
  std::vector<double> seconds = {};
};

struct Options {
  bool json = false, quick = false;
  int runs = 40;  // measurements of every variant
  std::string only, commit;
  csfast::Design design;  // of select, execute and ffn
};

// Times one case and adds its rows. Gives the bytes a second that were read in turns with all the
// rest.
double measure(const Case& c, std::vector<Layer>& layers, const Operations& ops,
               const Reader& reader, int runs, cudaStream_t stream, std::vector<Row>& rows) {
  double kept = 0;
  for (Layer& layer : layers) {
    ops.set_density(c, layer);
    kept += layer.kept / static_cast<double>(layers.size());
  }
  ops.compare(c, layers.front());

  const double sensed = csfast::bench::select_bytes(c);
  const double executed = csfast::bench::execute_bytes(c, kept);
  const double dense_bytes = csfast::bench::execute_bytes(c, static_cast<double>(c.n_neurons));
  const int n_layers = static_cast<int>(layers.size());
  const auto of_layers = [&](void (Operations::*call)(const Case&, const Layer&) const) {
    return Graph(stream, [&] {
      for (const Layer& layer : layers) (ops.*call)(c, layer);
    });
  };
  const auto space = [&](int64_t (*bytes)(int64_t, int64_t, int64_t, Device)) {
    return bytes(c.batch, c.d, c.n_neurons, Device::kCuda);
  };
  const int64_t execute_space = space(csfast::execute_workspace);
  // The last two are what the others are measured by.
  std::vector<Variant> variants;
  variants.push_back({"complete", sensed + executed, space(csfast::ffn_workspace), n_layers,
                      of_layers(&Operations::ffn)});
  variants.push_back(
      {"execute", executed, execute_space, n_layers, of_layers(&Operations::execute)});
  variants.push_back({"select", sensed, space(csfast::select_workspace), n_layers,
                      of_layers(&Operations::select)});
  variants.push_back(
      {"all neurons", dense_bytes, execute_space, n_layers, of_layers(&Operations::execute_all)});
  variants.push_back({"read", reader.bytes(), 0, 1, Graph(stream, [&] { reader.read_all(); })});

  Stopwatch stopwatch;
  for (int turn = -kWarmup; turn < runs; ++turn) {
    for (size_t i = 0; i < variants.size(); ++i) {
      // Another variant goes first every turn: the first one pays for what the last one evicted.
      Variant& variant = variants[(turn + kWarmup + i) % variants.size()];
      const double seconds = stopwatch.seconds_of(variant.graph, stream) / variant.calls;
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
    rows.push_back({.of = c,
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

std::vector<Case> cases_of(const Options& options) {
  const std::span<const Case> all = options.quick
                                        ? std::span<const Case>(csfast::bench::kQuickCases)
                                        : std::span<const Case>(csfast::bench::kCudaCases);
  std::vector<Case> found;
  for (const Case& c : all) {
    if (std::string(c.name).find(options.only) != std::string::npos) found.push_back(c);
  }
  return found;
}

// Version of the NVIDIA driver; empty where the system does not tell.
std::string driver() {
  std::ifstream file("/proc/driver/nvidia/version");
  std::string word;
  while (file >> word) {
    if (word.find('.') != std::string::npos &&
        word.find_first_not_of("0123456789.") == std::string::npos) {
      return word;
    }
  }
  return "";
}

// MHz of the processors, just after they were at work.
double clock_rate(cudaStream_t stream) {
  Array<int64_t> ticks(2);
  csfast::cuda::launch("bench", "clock", clock_kernel, dim3(1), dim3(1), stream,
                       ClockParams{.ticks = ticks.data()});
  const std::vector<int64_t> found = ticks.read(2);
  return static_cast<double>(found[0]) * 1e3 / static_cast<double>(found[1]);
}

csfast::bench::Head head_of(const Options& options, double clock, int argc, char** argv) {
  using csfast::bench::quoted;
  cudaDeviceProp properties{};
  want(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  int runtime = 0;
  want(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  const std::string cuda =
      std::to_string(runtime / 1000) + "." + std::to_string(runtime % 1000 / 10);
  return {
      .command = csfast::bench::command_of(argc, argv),
      .commit = options.commit,
      .machine = {{"device", "\"cuda\""},
                  {"cpu", quoted(csfast::bench::cpu_name())},
                  {"gpu", quoted(properties.name)},
                  {"processors", std::to_string(properties.multiProcessorCount)},
                  {"l2_bytes", std::to_string(properties.l2CacheSize)},
                  {"clock_mhz", std::to_string(std::lround(clock))},
                  {"clock_mhz_max", std::to_string(attribute(cudaDevAttrClockRate) / 1000)}},
      .versions = {
          {"cuda", quoted(cuda)}, {"driver", quoted(driver())}, {"compiler", quoted(__VERSION__)}}};
}

// Gives the number of cases and rows that failed, each of which says why on stderr.
int run(const Options& options, int argc, char** argv) {
  if (!csfast::cuda::available()) throw BackendError("[bench] no CUDA device: want one.");
  const Stream stream;
  const std::vector<Case> cases = cases_of(options);
  if (cases.empty()) {
    throw std::invalid_argument("[bench] --only " + options.only +
                                ": want a part of the name of a case.");
  }
  std::vector<Row> rows;
  double bandwidth = 0;
  int failed = 0;
  csfast::bench::for_shapes(cases, [&](std::span<const Case> alike) {
    int64_t batch_max = 1;
    for (const Case& c : alike) batch_max = std::max(batch_max, c.batch);
    std::vector<Layer> layers;
    for (int i = 0; i < alike[0].layers; ++i) {
      layers.push_back(random_layer(alike[0], batch_max, static_cast<uint64_t>(i + 1), stream));
    }
    const Operations ops(alike[0], batch_max, options.design, stream);
    const Reader reader(layers, stream);
    for (const Case& c : alike) {
      const size_t first = rows.size();
      std::FILE* out = options.json ? stderr : stdout;
      try {
        std::fprintf(out, "%s  %s\n", c.name, ops.describe(c, layers.front()).c_str());
        bandwidth =
            std::max(bandwidth, measure(c, layers, ops, reader, options.runs, stream, rows));
      } catch (const BackendError& error) {
        std::fprintf(stderr, "%s\n", error.what());
        ++failed;  // the other cases may be right
      }
      for (size_t i = first; i < rows.size(); ++i) {
        std::fprintf(out, "%s\n", csfast::bench::to_text(rows[i]).c_str());
      }
      std::fflush(out);
    }
  });
  const csfast::bench::Head head = head_of(options, clock_rate(stream), argc, argv);
  if (options.json) {
    csfast::bench::print_json(head, bandwidth, rows);
  } else {
    for (const auto* pairs : {&head.machine, &head.versions}) {
      for (const auto& [name, value] : *pairs) std::printf("%s %s\n", name.c_str(), value.c_str());
    }
    std::printf("read bandwidth %.1f GB/s\n", bandwidth / 1e9);
  }
  if (!options.quick) failed += csfast::bench::too_fast(rows);
  return failed;
}

// False if the command line makes no sense.
bool parse(int argc, char** argv, Options& options) {
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    const bool has_value = i + 1 < argc;
    if (option == "--json") {
      options.json = true;
    } else if (option == "--quick") {
      options.quick = true;
      options.runs = 3;
    } else if (option == "--only" && has_value) {
      options.only = argv[++i];
    } else if (option == "--design" && has_value) {
      try {
        options.design = csfast::parse_design("bench", argv[++i]);
      } catch (const std::invalid_argument& error) {
        std::fprintf(stderr, "bench_ffn_cuda: %s\n", error.what());
        return false;
      }
    } else if (option == "--commit" && has_value) {
      options.commit = argv[++i];
    } else if (option == "--runs" && has_value) {
      options.runs = std::atoi(argv[++i]);
      if (options.runs < 1) return false;
    } else {
      return false;
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  if (!parse(argc, argv, options)) {
    std::fprintf(stderr,
                 "usage: bench_ffn_cuda [--quick] [--json] [--runs N] [--only TEXT] "
                 "[--design WORDS] [--commit HASH]\n");
    return 2;
  }
  try {
    return run(options, argc, argv) == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_ffn_cuda: %s\n", error.what());
    return 1;
  }
}
