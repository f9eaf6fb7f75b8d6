#include "csfast/engine.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "csfast/linear.h"
#include "engine/team.h"
#include "isa/base/number.h"
#include "loops.h"
#include "share.h"

namespace csfast {
namespace {

using base::BFloat16;
using base::from_float;
using base::to_float;

constexpr int64_t kVocabularyBlock = 4096;  // logits that one thread looks through at once

[[noreturn]] void refuse(const std::string& given, const std::string& wanted) {
  throw std::invalid_argument("[engine] " + given + ": want " + wanted + ".");
}

void check(const EngineModel& m) {
  const auto positive = [](const char* name, int64_t value) {
    if (value < 1) refuse(std::string(name) + " = " + std::to_string(value), "at least 1");
  };
  positive("layers", static_cast<int64_t>(m.layers.size()));
  positive("d", m.d);
  positive("n_neurons", m.n_neurons);
  positive("n_heads", m.n_heads);
  positive("n_kv_heads", m.n_kv_heads);
  positive("vocabulary", m.vocabulary);
  if (m.n_heads % m.n_kv_heads != 0) {
    refuse(
        "n_heads = " + std::to_string(m.n_heads) + ", n_kv_heads = " + std::to_string(m.n_kv_heads),
        "as many queries for every head of keys");
  }
  if (m.head_dim < 16 || m.head_dim % 16 != 0) {
    refuse("head_dim = " + std::to_string(m.head_dim), "a multiple of 16");
  }
  if (m.dtype == DType::kF16) refuse("weights of float16", "float32 or bfloat16");
}

void check(const EngineSizes& sizes) {
  if (sizes.texts < 1) refuse("texts = " + std::to_string(sizes.texts), "at least 1");
  if (sizes.positions < 1 || sizes.positions % kAttentionSplit != 0) {
    refuse("positions = " + std::to_string(sizes.positions),
           "a multiple of " + std::to_string(kAttentionSplit));
  }
}

int64_t size_of(DType dtype) {
  return dtype == DType::kF32 ? 4 : 2;
}

int64_t blocks_of(int64_t vocabulary) {
  return (vocabulary + kVocabularyBlock - 1) / kVocabularyBlock;
}

// What a step works on; all float rows but q, which is that of sketch.h.
struct Buffers {
  float* x;           // (rows, d), the residual stream
  float* normed;      // (rows, d)
  float* qkv;         // (rows, all of them), or one after another
  float* partial;     // (rows, n_heads, splits, head_dim + 2), see AttendPart
  float* attended;    // (rows, n_heads * head_dim)
  float* out;         // (rows, d), of a half of a layer
  float* gate_up;     // (rows, 2 n_neurons), or gate and up
  float* hidden;      // (rows, n_neurons)
  float* work;        // (rows, linear_width)
  float* z;           // (rows, cols)
  int8_t* q;          // (rows, sketch_width)
  float* scale;       // (rows)
  Likeliest* likely;  // (rows, blocks of the vocabulary)
};

// Cuts the buffers out of memory at `base` and returns how much that takes; base may be null.
int64_t lay_out(const EngineModel& m, const EngineSizes& sizes, uint8_t* base, Buffers& to) {
  int64_t used = 0;
  const auto cut = [&]<typename E>(E*& part, int64_t of_each) {
    part = base == nullptr ? nullptr : reinterpret_cast<E*>(base + used);
    used += line_up(kEngineRows * of_each * static_cast<int64_t>(sizeof(E)));
  };
  const int64_t attended = m.n_heads * m.head_dim;
  const int64_t widest = std::max({m.d, m.n_neurons, attended});
  cut(to.x, m.d);
  cut(to.normed, m.d);
  cut(to.qkv, (m.n_heads + 2 * m.n_kv_heads) * m.head_dim);
  cut(to.partial, m.n_heads * (sizes.positions / kAttentionSplit) * (m.head_dim + 2));
  cut(to.attended, attended);
  cut(to.out, m.d);
  cut(to.gate_up, 2 * m.n_neurons);
  cut(to.hidden, m.n_neurons);
  cut(to.work, linear_width(widest));
  cut(to.z, widest);
  cut(to.q, sketch_width(widest));
  cut(to.scale, 1);
  cut(to.likely, blocks_of(m.vocabulary));
  return used;
}

// Strided of a buffer.
struct Strided {
  float* at;
  int64_t stride;

  float* operator[](int64_t row) const { return at + row * stride; }
};

template <typename T>
void add(const T* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] += to_float(from[i]);
}

void add_bias(const void* bias, DType dtype, int64_t first, int64_t n, float* to) {
  if (bias == nullptr) return;
  if (dtype == DType::kF32) return add(static_cast<const float*>(bias) + first, n, to);
  add(static_cast<const BFloat16*>(bias) + first, n, to);
}

template <typename T>
void turn_as(const T* cosine, const T* sine, int64_t half, float* x) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + half] = b * cosine[i] + a * sine[i];
  }
}

template <typename T>
void keep_as(const float* key, const float* value, int64_t d, int64_t position, T* keys,
             T* values) {
  T* to = keys + position / kKeyBlock * d * kKeyBlock + position % kKeyBlock;
  for (int64_t c = 0; c < d; ++c) to[c * kKeyBlock] = from_float<T>(key[c]);
  for (int64_t c = 0; c < d; ++c) values[position * d + c] = from_float<T>(value[c]);
}

template <typename T>
void embed_as(const T* embedding, int64_t d, float scale, float* x) {
  for (int64_t i = 0; i < d; ++i) x[i] = to_float(embedding[i]) * scale;
}

}  // namespace

int64_t engine_cache(const EngineModel& m, const EngineSizes& sizes) {
  check(m);
  check(sizes);
  return 2 * static_cast<int64_t>(m.layers.size()) * sizes.texts * m.n_kv_heads * sizes.positions *
         m.head_dim * size_of(m.dtype);
}

int64_t engine_workspace(const EngineModel& m, const EngineSizes& sizes) {
  check(m);
  check(sizes);
  Buffers nowhere;
  return lay_out(m, sizes, nullptr, nowhere);
}

// One step, and what it needs.
struct Engine::Pass {
  struct Place {
    int64_t text, position;
  };

  EngineModel m;
  EngineSizes sizes;
  EngineMemory memory;
  Buffers of{};
  Team team;
  std::vector<int64_t> length;  // of every text
  Place place[kEngineRows];     // of the rows of the step
  int64_t n = 0;                // rows of the step
  bool coded = false;

  Pass(EngineModel model, const EngineSizes& s, const EngineMemory& given, int n_threads)
      : m(std::move(model)), sizes(s), memory(given), team(n_threads) {
    lay_out(m, sizes, static_cast<uint8_t*>(memory.workspace), of);
    length.assign(static_cast<size_t>(sizes.texts), 0);
  }

  // Where the keys (or values) of a head of a text begin, in elements.
  int64_t head_at(size_t layer, bool values, int64_t text, int64_t head) const {
    const int64_t half = 2 * static_cast<int64_t>(layer) + values;
    return ((half * sizes.texts + text) * m.n_kv_heads + head) * sizes.positions * m.head_dim;
  }

  struct Product {
    const EngineMap& map;
    float* y;
    int64_t rows;
  };

  LinearParams params(const Product& product, const float* x, int64_t cols, int64_t rows) const {
    return {.w = product.map.w,
            .bias = product.map.bias,
            .x = x,
            .work = of.work,
            .y = product.y,
            .batch = rows,
            .rows = product.rows,
            .cols = cols,
            .dtype = m.dtype};
  }
  SketchParams params(const EngineCode& code, const float* x, int64_t cols, int64_t out, float* y,
                      int64_t rows) const {
    SketchParams p{};
    std::copy_n(code.level, code.n_levels, p.level);
    p.turn = code.turn;
    p.x = x;
    p.z = of.z;
    p.q = of.q;
    p.scale = of.scale;
    p.y = y;
    p.batch = rows;
    p.rows = out;
    p.cols = cols;
    p.n_levels = code.n_levels;
    p.dtype = DType::kF32;
    return p;
  }

  // Products with one input (rows, cols), shared out together.
  void multiply(std::initializer_list<Product> products, const float* x, int64_t cols,
                int64_t rows) {
    LinearParams of_each[3];
    int64_t begin[4] = {};
    int count = 0;
    for (const Product& product : products) {
      of_each[count] = params(product, x, cols, rows);
      begin[count + 1] = begin[count] + linear_tiles_of(product.rows);
      ++count;
    }
    linear_prepare(of_each[0]);
    team.run(begin[count], [&](int64_t first, int64_t last) {
      for (int i = 0; i < count; ++i) {
        const int64_t from = std::max(first, begin[i]), to = std::min(last, begin[i + 1]);
        if (from < to) linear_tiles(of_each[i], from - begin[i], to - begin[i]);
      }
    });
  }
  void multiply(const EngineCode& code, const float* x, int64_t cols, int64_t out, float* y,
                int64_t rows) {
    const SketchParams p = params(code, x, cols, out, y, rows);
    sketch_prepare(p);
    team.run(trellis_row_tiles(out),
             [&](int64_t first, int64_t last) { sketch_tiles(p, first, last); });
  }

  // The codes have the gain in them.
  void norm(const float* gain) {
    for (int64_t i = 0; i < n; ++i) {
      loops().norm(of.x + i * m.d, coded ? nullptr : gain, m.d, m.eps, of.normed + i * m.d);
    }
  }

  void embed(const EngineRow* rows) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = rows[i].token * m.d;
      if (m.dtype == DType::kF32) {
        embed_as(static_cast<const float*>(m.embedding) + at, m.d, m.embedding_scale,
                 of.x + i * m.d);
      } else {
        embed_as(static_cast<const BFloat16*>(m.embedding) + at, m.d, m.embedding_scale,
                 of.x + i * m.d);
      }
    }
  }

  // Queries, keys and values of all rows.
  void read(const EngineLayer& layer, Strided& q, Strided& k, Strided& v) {
    const int64_t queries = m.n_heads * m.head_dim, keys = m.n_kv_heads * m.head_dim;
    norm(layer.before_attention);
    if (!coded) {
      q = {of.qkv, queries};
      k = {q[n], keys};
      v = {k[n], keys};
      multiply({{layer.q, q.at, queries}, {layer.k, k.at, keys}, {layer.v, v.at, keys}}, of.normed,
               m.d, n);
      return;
    }
    const int64_t all = queries + 2 * keys;
    q = {of.qkv, all};
    k = {of.qkv + queries, all};
    v = {of.qkv + queries + keys, all};
    multiply(layer.qkv_code, of.normed, m.d, all, of.qkv, n);
    for (int64_t i = 0; i < n; ++i) {
      add_bias(layer.q.bias, m.dtype, 0, queries, q[i]);
      add_bias(layer.k.bias, m.dtype, 0, keys, k[i]);
      add_bias(layer.v.bias, m.dtype, 0, keys, v[i]);
    }
  }

  // Norms and positions of one row's queries and keys; its keys and values into the cache.
  void keep(size_t number, const EngineLayer& layer, int64_t row, const Strided& q,
            const Strided& k, const Strided& v) {
    const int64_t d = m.head_dim;
    const auto [text, position] = place[row];
    const float* cosine = layer.cosine + position * (d / 2);
    const float* sine = layer.sine + position * (d / 2);
    for (int64_t h = 0; h < m.n_heads; ++h) {
      float* x = q[row] + h * d;
      if (layer.of_q != nullptr) loops().norm(x, layer.of_q, d, m.eps, x);
      turn_as(cosine, sine, d / 2, x);
    }
    for (int64_t h = 0; h < m.n_kv_heads; ++h) {
      float* x = k[row] + h * d;
      if (layer.of_k != nullptr) loops().norm(x, layer.of_k, d, m.eps, x);
      turn_as(cosine, sine, d / 2, x);
      const int64_t keys = head_at(number, false, text, h), values = head_at(number, true, text, h);
      if (m.dtype == DType::kF32) {
        float* cache = static_cast<float*>(memory.cache);
        keep_as(x, v[row] + h * d, d, position, cache + keys, cache + values);
      } else {
        BFloat16* cache = static_cast<BFloat16*>(memory.cache);
        keep_as(x, v[row] + h * d, d, position, cache + keys, cache + values);
      }
    }
  }

  float* partial(int64_t row, int64_t split, int64_t head) const {
    const int64_t splits = sizes.positions / kAttentionSplit;
    return of.partial + ((row * splits + split) * m.n_heads + head) * (m.head_dim + 2);
  }

  // The first position that a row attends to.
  int64_t first_of(const EngineLayer& layer, int64_t row) const {
    return layer.window > 0 ? std::max<int64_t>(0, place[row].position + 1 - layer.window) : 0;
  }

  void attend(size_t number, const EngineLayer& layer, const Strided& q) {
    const int64_t shared = m.n_heads / m.n_kv_heads;
    int64_t last = 0;
    for (int64_t i = 0; i < n; ++i) last = std::max(last, place[i].position);
    const int64_t splits = last / kAttentionSplit + 1;
    const auto part = [&](int64_t item) {
      const int64_t head = item % m.n_kv_heads;
      const int64_t row = item / m.n_kv_heads % n;
      const int64_t split = item / m.n_kv_heads / n;
      const auto [text, position] = place[row];
      const int64_t from = std::max(first_of(layer, row), split * kAttentionSplit);
      const int64_t to = std::min(position + 1, (split + 1) * kAttentionSplit);
      if (from >= to) return;
      const char* cache = static_cast<const char*>(memory.cache);
      loops().attend({.q = q[row] + head * shared * m.head_dim,
                      .k = cache + head_at(number, false, text, head) * size_of(m.dtype),
                      .v = cache + head_at(number, true, text, head) * size_of(m.dtype),
                      .out = partial(row, split, head * shared),
                      .head_dim = m.head_dim,
                      .n_heads = shared,
                      .first = from,
                      .last = to,
                      .scale = m.score_scale,
                      .cap = m.score_cap,
                      .dtype = m.dtype});
    };
    team.run(n * m.n_kv_heads * splits, [&](int64_t first, int64_t end) {
      for (int64_t item = first; item < end; ++item) part(item);
    });
  }

  // What the splits of one row give together, in their order.
  void merge(const EngineLayer& layer, int64_t row) {
    const int64_t d = m.head_dim;
    const int64_t begin = first_of(layer, row) / kAttentionSplit;
    const int64_t end = place[row].position / kAttentionSplit + 1;
    for (int64_t h = 0; h < m.n_heads; ++h) {
      float* out = of.attended + (row * m.n_heads + h) * d;
      float most = partial(row, begin, h)[d];
      for (int64_t s = begin + 1; s < end; ++s) most = std::max(most, partial(row, s, h)[d]);
      std::fill_n(out, d, 0.0f);
      float total = 0;
      for (int64_t s = begin; s < end; ++s) {
        const float* part = partial(row, s, h);
        const float weight = std::exp(part[d] - most);
        total += part[d + 1] * weight;
        for (int64_t i = 0; i < d; ++i) out[i] += part[i] * weight;
      }
      for (int64_t i = 0; i < d; ++i) out[i] /= total;
    }
  }

  // Adds the output of a half of a layer to the residual stream.
  void add_out(const float* gain) {
    for (int64_t i = 0; i < n; ++i) {
      float* out = of.out + i * m.d;
      if (gain != nullptr) loops().norm(out, gain, m.d, m.eps, out);
      add(out, m.d, of.x + i * m.d);
    }
  }

  void attention(size_t number, const EngineLayer& layer) {
    Strided q{}, k{}, v{};
    read(layer, q, k, v);
    team.run(n, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) keep(number, layer, row, q, k, v);
    });
    attend(number, layer, q);
    team.run(n, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) merge(layer, row);
    });
    back(layer.o, layer.o_code, of.attended, m.n_heads * m.head_dim);
    add_out(layer.after_attention);
  }

  // of.out = the product of a map back to the residual stream.
  void back(const EngineMap& map, const EngineCode& code, const float* x, int64_t cols) {
    if (!coded) return multiply({{map, of.out, m.d}}, x, cols, n);
    multiply(code, x, cols, m.d, of.out, n);
    for (int64_t i = 0; i < n; ++i) add_bias(map.bias, m.dtype, 0, m.d, of.out + i * m.d);
  }

  // Neurons first .. last - 1, whose products with gate and up are there.
  void gated(const EngineLayer& layer, const Strided& gate, const Strided& up, int64_t first,
             int64_t last) {
    for (int64_t i = 0; i < n; ++i) {
      if (coded) {
        add_bias(layer.gate.bias, m.dtype, first, last - first, gate[i] + first);
        add_bias(layer.up.bias, m.dtype, first, last - first, up[i] + first);
      }
      loops().gated(m.activation, gate[i] + first, up[i] + first, last - first,
                    of.hidden + i * m.n_neurons + first);
    }
  }

  void feed_forward(const EngineLayer& layer) {
    const int64_t neurons = m.n_neurons;
    norm(layer.before_ffn);
    if (!coded) {
      const Strided gate{of.gate_up, neurons}, up{gate[n], neurons};
      const LinearParams of_gate = params({layer.gate, gate.at, neurons}, of.normed, m.d, n);
      const LinearParams of_up = params({layer.up, up.at, neurons}, of.normed, m.d, n);
      linear_prepare(of_gate);
      team.run(linear_tiles_of(neurons), [&](int64_t first, int64_t last) {
        linear_tiles(of_gate, first, last);
        linear_tiles(of_up, first, last);
        gated(layer, gate, up, first * kLinearTile, std::min(neurons, last * kLinearTile));
      });
    } else {
      const Strided gate{of.gate_up, 2 * neurons}, up{of.gate_up + neurons, 2 * neurons};
      const SketchParams p = params(layer.gate_up_code, of.normed, m.d, 2 * neurons, of.gate_up, n);
      sketch_prepare(p);
      if (neurons % kTrellisRows == 0) {
        const int64_t tiles = neurons / kTrellisRows;
        team.run(tiles, [&](int64_t first, int64_t last) {
          sketch_tiles(p, first, last);
          sketch_tiles(p, tiles + first, tiles + last);
          gated(layer, gate, up, first * kTrellisRows, last * kTrellisRows);
        });
      } else {
        team.run(trellis_row_tiles(2 * neurons),
                 [&](int64_t first, int64_t last) { sketch_tiles(p, first, last); });
        gated(layer, gate, up, 0, neurons);
      }
    }
    back(layer.down, layer.down_code, of.hidden, neurons);
    add_out(layer.after_ffn);
  }

  // Logits and choices of all rows but the first n_quiet.
  void choose(int64_t n_quiet, Choice* choice) {
    const int64_t rows = n - n_quiet;
    if (rows == 0) return;
    norm(m.norm);
    const float* x = of.normed + n_quiet * m.d;
    float* logits = memory.logits + n_quiet * m.vocabulary;
    if (!coded) {
      multiply({{m.head, logits, m.vocabulary}}, x, m.d, rows);
    } else {
      multiply(m.head_code, x, m.d, m.vocabulary, logits, rows);
      for (int64_t i = 0; i < rows; ++i) {
        add_bias(m.head.bias, m.dtype, 0, m.vocabulary, logits + i * m.vocabulary);
      }
    }
    const int64_t blocks = blocks_of(m.vocabulary);
    team.run(rows * blocks, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t begin = item % blocks * kVocabularyBlock;
        of.likely[item] =
            loops().likeliest(logits + item / blocks * m.vocabulary + begin,
                              std::min(kVocabularyBlock, m.vocabulary - begin), m.logit_cap);
      }
    });
    for (int64_t i = 0; i < rows; ++i) {
      const Likeliest* part = of.likely + i * blocks;
      int64_t best = 0;
      for (int64_t b = 1; b < blocks; ++b) best = part[b].most > part[best].most ? b : best;
      float sum = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        sum += part[b].sum * std::exp(part[b].most - part[best].most);
      }
      choice[n_quiet + i] = {
          .token = static_cast<int32_t>(best * kVocabularyBlock + part[best].index),
          .log_prob = -std::log(sum)};
    }
  }
};

Engine::Engine(EngineModel model, const EngineSizes& sizes, const EngineMemory& memory,
               int n_threads) {
  check(model);
  check(sizes);
  if (n_threads < 1) refuse("threads = " + std::to_string(n_threads), "at least 1");
  pass_ = std::make_unique<Pass>(std::move(model), sizes, memory, n_threads);
}

Engine::~Engine() = default;

int64_t Engine::length(int64_t text) const {
  if (text < 0 || text >= pass_->sizes.texts) {
    refuse("text = " + std::to_string(text), "one of " + std::to_string(pass_->sizes.texts));
  }
  return pass_->length[static_cast<size_t>(text)];
}

void Engine::rewind(int64_t text, int64_t length) {
  if (length < 0 || length > this->length(text)) {
    refuse("length = " + std::to_string(length) + " of text " + std::to_string(text),
           "0 to " + std::to_string(this->length(text)) + ", what it has");
  }
  pass_->length[static_cast<size_t>(text)] = length;
}

void Engine::step(const EngineRow* rows, int64_t n, int64_t n_quiet, bool coded) {
  Pass& pass = *pass_;
  if (n < 1 || n > kEngineRows || n_quiet < 0 || n_quiet > n) {
    refuse(std::to_string(n) + " rows, " + std::to_string(n_quiet) + " quiet",
           "1 to " + std::to_string(kEngineRows) + ", no more of them quiet");
  }
  if (coded && pass.m.head_code.n_levels == 0) refuse("no sketch", "one to draft with");
  std::vector<int64_t> length = pass.length;
  for (int64_t i = 0; i < n; ++i) {
    const auto [text, token] = rows[i];
    if (token < 0 || token >= pass.m.vocabulary) {
      refuse("token " + std::to_string(token), "0 to " + std::to_string(pass.m.vocabulary - 1));
    }
    if (text < 0 || text >= pass.sizes.texts) {
      refuse("text = " + std::to_string(text), "one of " + std::to_string(pass.sizes.texts));
    }
    const int64_t position = length[static_cast<size_t>(text)]++;
    if (position >= pass.sizes.positions) {
      refuse("position " + std::to_string(position),
             "room for it: there is some for " + std::to_string(pass.sizes.positions));
    }
    pass.place[i] = {text, position};
  }
  pass.n = n;
  pass.coded = coded;
  pass.embed(rows);
  for (size_t layer = 0; layer < pass.m.layers.size(); ++layer) {
    pass.attention(layer, pass.m.layers[layer]);
    pass.feed_forward(pass.m.layers[layer]);
  }
  pass.choose(n_quiet, choice_);
  pass.length = std::move(length);
}

Round Engine::round(int64_t text, int32_t token, const int32_t* given, int64_t n_given,
                    int64_t longest, float surely) {
  const int64_t start = length(text);
  if (n_given < 0 || longest < 0 || std::max(n_given, longest) >= kEngineRows) {
    refuse(std::to_string(n_given) + " drafts given, longest = " + std::to_string(longest),
           "0 to " + std::to_string(kEngineRows - 1));
  }
  Round round{};
  EngineRow rows[kEngineRows] = {{text, token}};
  int64_t n = 0;
  for (; n < n_given; ++n) rows[n + 1] = {text, given[n]};
  if (n_given == 0 && longest > 0) {
    for (float sure = 1.0f; n < longest && sure >= surely; ++n) {
      step(rows + n, 1, 0, true);
      const float probability = std::exp(choice_[0].log_prob);
      if (!std::isfinite(probability)) break;  // of a sketch that is off: the model decides
      rows[n + 1] = {text, choice_[0].token};
      round.probability[n] = probability;
      sure *= probability;
    }
    rewind(text, start);
  }
  step(rows, n + 1, 0, false);
  int64_t kept = 0;
  while (kept < n && rows[kept + 1].token == choice_[kept].token) ++kept;
  for (int64_t i = 0; i <= kept; ++i) {
    if (std::isfinite(choice_[i].log_prob)) continue;
    rewind(text, start);
    throw NotFiniteError("[engine] logits after position " + std::to_string(start + i) +
                         ": not finite; want a model whose logits are.");
  }
  rewind(text, start + kept + 1);
  round.n_drafted = static_cast<int>(n);
  round.n_kept = static_cast<int>(kept);
  std::copy_n(choice_, kept + 1, round.choice);
  return round;
}

}  // namespace csfast
