// Session: the layers of a model bound once, so that a token costs one call of plain addresses.
//
// Owns no tensor: memory is the caller's, who keeps it alive while the session does. On CUDA a
// layer is prepared for every batch up to kPreparedMax, and made graphs of, when it is bound.
// Larger batches, and an x that begins off a multiple of 16 bytes, go by ffn(), which chooses anew
// each time.
#pragma once

#include <cstdint>
#include <vector>

#include "csfast/ffn.h"
#include "csfast/prepared.h"
#include "csfast/types.h"

namespace csfast {

// What one launch of the kernels for a batch takes, and what a decoding engine binds.
inline constexpr int64_t kPreparedMax = 16;

class Session {
 public:
  explicit Session(Device device) : device_(device) {}
  Session(const Session&) = delete;

  // Takes everything of `p` but x, out and batch, which each call brings; p.batch is the most that
  // a call may ask for. Returns the number of the layer.
  int64_t bind(const FfnParams& p);

  // x (batch, d) to out (batch, d); `threshold` as bound.
  void ffn(int64_t layer, const void* x, void* out, int64_t batch, Stream stream);

  int64_t n_layers() const { return static_cast<int64_t>(layers_.size()); }

 private:
  struct Bound {
    FfnParams params;
    std::vector<cuda::Replay> prepared;  // on CUDA: by batch - 1
  };

  Device device_;
  std::vector<Bound> layers_;
};

}  // namespace csfast
