// Engine: the decode loop of a language model on the CPU, a token or sixteen at a time.
//
//   x = embedding[token] * embedding_scale
//   each layer:  x += norm(o (attention(rope(norm(q)), rope(norm(k)), v of norm(x))))
//                x += norm(down (activation(gate norm(x)) * up norm(x)))
//   logits = cap(head norm(x))
//
// A step appends rows to texts, up to kEngineRows of them, each the next token of its text, and
// reads every weight once. What a row gives depends on the tokens before it in its text alone: its
// bits are the same alone or beside fifteen others, of its own text or of others, whatever the
// threads. Activations are float32; weights, keys and values are T, and products are those of
// linear.h.
//
// With a sketch, `round` drafts tokens with its codes (sketch.h), checks all of them in one step of
// the model, and keeps those that the model chooses itself. Keys and values of drafts are replaced
// by the model's in that step, so every text of the cache is the model's own view. What comes out
// is what steps of one row give, bit for bit.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "csfast/sketch.h"
#include "csfast/types.h"

namespace csfast {

inline constexpr int64_t kEngineRows = 16;       // of one step
inline constexpr int64_t kAttentionSplit = 256;  // positions that are summed up apart
inline constexpr int64_t kKeyBlock = 16;         // positions whose keys lie channel by channel

// A linear map as torch holds it.
struct EngineMap {
  const void* w;     // (rows, cols), T
  const void* bias;  // (rows), T, or null
};

// The sketch of linear maps that read one input, their rows one below the other.
struct EngineCode {
  SketchLevel level[kSketchLevelsMax];
  const uint32_t* turn;  // (cols), see sketch.h
  int n_levels = 0;      // that drafts read; 0 without a sketch
};

struct EngineLayer {
  EngineMap q, k, v, o, gate, up, down;
  EngineCode qkv_code, o_code, gate_up_code, down_code;
  // Gains of norms, float32: before attention and the feed-forward layer (d), after each of them
  // (d) or null, of the heads of queries and keys (head_dim) or null.
  const float *before_attention, *before_ffn, *after_attention, *after_ffn, *of_q, *of_k;
  const float *cosine, *sine;  // (positions, head_dim / 2)
  int64_t window;              // positions that a token attends to, its own included; 0 for all
};

struct EngineModel {
  std::vector<EngineLayer> layers;
  const void* embedding;  // (vocabulary, d), T
  EngineMap head;         // (vocabulary, d)
  EngineCode head_code;
  const float* norm;  // (d), before the head
  DType dtype;        // T: float32 or bfloat16
  Activation activation;
  int64_t d, n_neurons, n_heads, n_kv_heads, head_dim, vocabulary;
  float eps;              // of the norms
  float embedding_scale;  // 1 for none
  float score_scale;      // of queries times keys
  float score_cap;        // cap * tanh(score / cap), or 0 for none
  float logit_cap;        // the same for logits
};

// The sizes of the memory that an engine is given.
struct EngineSizes {
  int64_t texts;      // that are held at once
  int64_t positions;  // of each, a multiple of kAttentionSplit; no more than tables of sines have
};

struct EngineMemory {
  void* cache;      // engine_cache bytes, zeros
  void* workspace;  // engine_workspace bytes
  float* logits;    // (kEngineRows, vocabulary)
};

int64_t engine_cache(const EngineModel& model, const EngineSizes& sizes);
int64_t engine_workspace(const EngineModel& model, const EngineSizes& sizes);

struct EngineRow {
  int64_t text;
  int32_t token;
};

// What the model would choose after a row.
struct Choice {
  int32_t token;   // the likeliest, the first of equals
  float log_prob;  // of it; not finite where the logits are not
};

// What a round has added to a text.
struct Round {
  int n_drafted;                       // tokens that were checked
  int n_kept;                          // of those, which the model chooses itself
  Choice choice[kEngineRows];          // n_kept + 1 of the model's own
  float probability[kEngineRows - 1];  // that the sketch gave to each drafted token
};

class Engine {
 public:
  // Keeps the pointers, all of the caller's memory. Throws std::invalid_argument if the sizes make
  // no sense.
  Engine(EngineModel model, const EngineSizes& sizes, const EngineMemory& memory, int n_threads);
  ~Engine();

  // Appends n <= kEngineRows rows to their texts. Logits and choices are those of the last
  // n - n_quiet rows, at the places of the rows. With `coded` the products are those of the sketch,
  // keys and values included.
  //
  // Throws std::invalid_argument for rows that are out of range or find no room, and then appends
  // none.
  void step(const EngineRow* rows, int64_t n, int64_t n_quiet, bool coded);

  // Of row i of the last step.
  const Choice& choice(int64_t i) const { return choice_[i]; }

  int64_t length(int64_t text) const;
  // Forgets what stands at positions `length` and beyond.
  void rewind(int64_t text, int64_t length);

  // Goes on with a text whose last token, not appended yet, is `token`: drafts up to `longest`
  // tokens with the sketch, as long as the product of their probabilities is at least `surely`, or
  // takes the n_given of `given` for drafts; checks them, and appends `token` and those that hold.
  //
  // Throws as `step` does, and NotFiniteError if the model's logits are not finite; the text is as
  // it was then.
  Round round(int64_t text, int32_t token, const int32_t* given, int64_t n_given, int64_t longest,
              float surely);

 private:
  struct Pass;
  std::unique_ptr<Pass> pass_;
  Choice choice_[kEngineRows];
};

}  // namespace csfast
