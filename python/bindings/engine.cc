#include "csfast/engine.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <string>
#include <vector>

#include "call.h"
#include "layer.h"
#include "number.h"

using namespace nb::literals;

namespace {

// The sizes that the tensors of a model share; one that is 0 columns apart stands for another.
struct EngineShape {
  Size d{"d"}, neurons{"n_neurons"}, queries{"n_heads * head_dim"}, keys{"n_kv_heads * head_dim"};
  Size vocabulary{"vocabulary"}, head_dim{"head_dim"}, half{"head_dim / 2"}, table{"positions"};
};

csfast::EngineMap map_of(Call& call, nb::handle map, const char* name, Size& rows, Size& cols) {
  return {.w = call.in_type(field(map, "weight"), name, {&rows, &cols}),
          .bias = call.in_type_or_null(field(map, "bias"), name, {&rows})};
}

csfast::EngineCode code_of(Call& call, nb::handle code, const std::string& name, int64_t n_rows,
                           int64_t n_cols) {
  csfast::EngineCode found{};
  if (code.is_none()) return found;
  Size rows{"rows", n_rows}, cols{"cols", n_cols};
  found.turn = reinterpret_cast<const uint32_t*>(
      call.in<int32_t>(field(code, "turn"), (name + ".turn").c_str(), {&cols}));
  const auto bits = nb::cast<std::vector<int>>(field(code, "bits"));
  const nb::sequence codes = nb::borrow<nb::sequence>(field(code, "codes"));
  const nb::sequence steps = nb::borrow<nb::sequence>(field(code, "steps"));
  if (bits.empty() || bits.size() > csfast::kSketchLevelsMax) {
    throw nb::value_error(("[engine] " + name + " of " + std::to_string(bits.size()) +
                           " levels: want 1 to " + std::to_string(csfast::kSketchLevelsMax) + ".")
                              .c_str());
  }
  found.n_levels = static_cast<int>(bits.size());
  for (size_t l = 0; l < bits.size(); ++l) {
    const std::string at = name + "[" + std::to_string(l) + "]";
    csfast::SketchLevel& level = found.level[l];
    level.bits = bits[l];
    if (level.bits < 1 || level.bits > csfast::kTrellisBitsMax) {
      throw nb::value_error(("[engine] " + at + " of " + std::to_string(bits[l]) +
                             " bits: want 1 to " + std::to_string(csfast::kTrellisBitsMax) + ".")
                                .c_str());
    }
    level.step = reinterpret_cast<const uint16_t*>(
        call.in<BFloat16>(nb::object(steps[l]), (at + ".step").c_str(), {&rows}));
    Size down{"ceil(rows / 64)", csfast::trellis_row_tiles(n_rows)};
    Size across{"ceil(cols / 8)", csfast::trellis_col_tiles(n_cols)};
    Size per_weight{"bits", level.bits}, bytes{"64", csfast::kTileBytes};
    level.codes = call.in<uint8_t>(nb::object(codes[l]), (at + ".codes").c_str(),
                                   {&down, &across, &per_weight, &bytes});
  }
  return found;
}

csfast::EngineLayer layer_of(Call& call, nb::handle layer, EngineShape& s) {
  csfast::EngineLayer to{};
  to.q = map_of(call, field(layer, "q"), "q", s.queries, s.d);
  to.k = map_of(call, field(layer, "k"), "k", s.keys, s.d);
  to.v = map_of(call, field(layer, "v"), "v", s.keys, s.d);
  to.o = map_of(call, field(layer, "o"), "o", s.d, s.queries);
  to.gate = map_of(call, field(layer, "gate"), "gate", s.neurons, s.d);
  to.up = map_of(call, field(layer, "up"), "up", s.neurons, s.d);
  to.down = map_of(call, field(layer, "down"), "down", s.d, s.neurons);
  to.qkv_code = code_of(call, field(layer, "qkv_code"), "qkv", s.queries + 2 * s.keys, s.d);
  to.o_code = code_of(call, field(layer, "o_code"), "o", s.d, s.queries);
  to.gate_up_code = code_of(call, field(layer, "gate_up_code"), "gate_up", 2 * s.neurons, s.d);
  to.down_code = code_of(call, field(layer, "down_code"), "down", s.d, s.neurons);
  const auto gain = [&](const char* name, Size& size) {
    return call.in_or_null<float>(field(layer, name), name, {&size});
  };
  to.before_attention = gain("before_attention", s.d);
  to.before_ffn = gain("before_ffn", s.d);
  to.after_attention = gain("after_attention", s.d);
  to.after_ffn = gain("after_ffn", s.d);
  to.of_q = gain("of_q", s.head_dim);
  to.of_k = gain("of_k", s.head_dim);
  to.cosine = call.in<float>(field(layer, "cosine"), "cosine", {&s.table, &s.half});
  to.sine = call.in<float>(field(layer, "sine"), "sine", {&s.table, &s.half});
  to.window = nb::cast<int64_t>(field(layer, "window"));
  return to;
}

// A csfast.models.Decoder, whose tensors the caller keeps.
csfast::EngineModel model_of(Call& call, nb::handle decoder, Size& table) {
  csfast::EngineModel to{};
  const auto number = [&](const char* name) { return nb::cast<int64_t>(field(decoder, name)); };
  const auto real = [&](const char* name) { return nb::cast<float>(field(decoder, name)); };
  to.n_heads = number("n_heads");
  to.n_kv_heads = number("n_kv_heads");
  to.head_dim = number("head_dim");
  EngineShape s{};
  s.head_dim.value = to.head_dim;
  s.half.value = to.head_dim / 2;
  s.queries.value = to.n_heads * to.head_dim;
  s.keys.value = to.n_kv_heads * to.head_dim;
  to.embedding = call.in_type(field(decoder, "embedding"), "embedding", {&s.vocabulary, &s.d});
  for (nb::handle layer : nb::borrow<nb::sequence>(field(decoder, "layers"))) {
    to.layers.push_back(layer_of(call, layer, s));
  }
  to.head = map_of(call, field(decoder, "head"), "head", s.vocabulary, s.d);
  to.head_code = code_of(call, field(decoder, "head_code"), "head", s.vocabulary, s.d);
  to.norm = call.in<float>(field(decoder, "norm"), "norm", {&s.d});
  to.dtype = call.dtype();
  to.activation = call.activation(nb::cast<std::string>(field(decoder, "activation")));
  to.d = s.d;
  to.n_neurons = s.neurons;
  to.vocabulary = s.vocabulary;
  to.eps = real("eps");
  to.embedding_scale = real("embedding_scale");
  to.score_scale = real("score_scale");
  to.score_cap = real("score_cap");
  to.logit_cap = real("logit_cap");
  table.value = s.table;
  return to;
}

nb::tuple sizes(nb::handle decoder, int64_t texts, int64_t positions) {
  Call call("engine");
  Size table{"positions"};
  const csfast::EngineModel model = model_of(call, decoder, table);
  const csfast::EngineSizes of{texts, positions};
  return nb::make_tuple(csfast::engine_cache(model, of), csfast::engine_workspace(model, of));
}

void init(csfast::Engine* engine, nb::handle decoder, nb::handle cache, nb::handle workspace,
          nb::handle logits, int64_t texts, int64_t positions, int threads) {
  Call call("engine");
  Size table{"positions"}, bytes{"bytes"}, rows{"16", csfast::kEngineRows};
  csfast::EngineModel model = model_of(call, decoder, table);
  const csfast::EngineSizes of{texts, positions};
  if (table < positions) {
    throw nb::value_error(("[engine] tables for " + std::to_string(table.value) +
                           " positions: want them for all " + std::to_string(positions) + ".")
                              .c_str());
  }
  csfast::EngineMemory memory{};
  memory.cache = call.out<uint8_t>(cache, "cache", {&bytes});
  const int64_t needed = csfast::engine_cache(model, of);
  if (bytes < needed) {
    throw nb::value_error(("[engine] cache of " + std::to_string(bytes.value) + " bytes: want " +
                           std::to_string(needed) + ".")
                              .c_str());
  }
  memory.workspace = call.workspace(workspace, csfast::engine_workspace(model, of));
  Size vocabulary{"vocabulary", model.vocabulary};
  memory.logits = call.out<float>(logits, "logits", {&rows, &vocabulary});
  if (call.device() != csfast::Device::kCpu) {
    throw nb::value_error("[engine] tensors on CUDA: want them on the CPU.");
  }
  new (engine) csfast::Engine(std::move(model), of, memory, threads);
}

void step(csfast::Engine& engine, const std::vector<int64_t>& texts,
          const std::vector<int32_t>& tokens, int64_t n_quiet, bool coded) {
  if (texts.size() != tokens.size()) {
    throw nb::value_error(("[engine] " + std::to_string(texts.size()) + " texts, " +
                           std::to_string(tokens.size()) + " tokens: want as many of each.")
                              .c_str());
  }
  std::vector<csfast::EngineRow> rows;
  for (size_t i = 0; i < texts.size(); ++i) rows.push_back({texts[i], tokens[i]});
  unlocked([&] { engine.step(rows.data(), static_cast<int64_t>(rows.size()), n_quiet, coded); });
}

nb::tuple round_of(csfast::Engine& engine, int64_t text, int32_t token,
                   const std::vector<int32_t>& given, int64_t longest, float surely) {
  const csfast::Round done = unlocked([&] {
    return engine.round(text, token, given.data(), static_cast<int64_t>(given.size()), longest,
                        surely);
  });
  nb::list tokens, log_probs, probabilities;
  for (int i = 0; i <= done.n_kept; ++i) {
    tokens.append(done.choice[i].token);
    log_probs.append(done.choice[i].log_prob);
  }
  for (int i = 0; i < done.n_drafted; ++i) probabilities.append(done.probability[i]);
  return nb::make_tuple(tokens, log_probs, probabilities);
}

nb::tuple choice(const csfast::Engine& engine, int64_t row) {
  if (row < 0 || row >= csfast::kEngineRows) {
    throw nb::value_error(("[engine] row = " + std::to_string(row) + ": want 0 to " +
                           std::to_string(csfast::kEngineRows - 1) + ".")
                              .c_str());
  }
  return nb::make_tuple(engine.choice(row).token, engine.choice(row).log_prob);
}

}  // namespace

void bind_engine(nb::module_& m) {
  m.def("engine_bytes", &sizes, "decoder"_a, "texts"_a, "positions"_a,
        nb::sig("def engine_bytes(decoder: object, texts: int, positions: int) "
                "-> tuple[int, int]"));
  nb::class_<csfast::Engine>(m, "Engine")
      .def("__init__", &init, "decoder"_a, "cache"_a, "workspace"_a, "logits"_a, "texts"_a,
           "positions"_a, "threads"_a,
           nb::sig("def __init__(self, decoder: object, cache: torch.Tensor, "
                   "workspace: torch.Tensor, logits: torch.Tensor, texts: int, positions: int, "
                   "threads: int) -> None"))
      .def("step", &step, "texts"_a, "tokens"_a, "n_quiet"_a, "coded"_a,
           nb::sig("def step(self, texts: list[int], tokens: list[int], n_quiet: int, "
                   "coded: bool) -> None"))
      .def("choice", &choice, "row"_a, nb::sig("def choice(self, row: int) -> tuple[int, float]"))
      .def("length", &csfast::Engine::length, "text"_a)
      .def("rewind", &csfast::Engine::rewind, "text"_a, "length"_a)
      .def("round", &round_of, "text"_a, "token"_a, "given"_a, "longest"_a, "surely"_a,
           nb::sig("def round(self, text: int, token: int, given: list[int], longest: int, "
                   "surely: float) -> tuple[list[int], list[float], list[float]]"));
}
