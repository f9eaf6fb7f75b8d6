#include "check.h"

#include <limits>
#include <stdexcept>
#include <string>
namespace csfast {
namespace {

constexpr int64_t kBatchMax = 65535;
constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

[[noreturn]] void refuse(const char* op, const std::string& given, const std::string& wanted) {
  throw std::invalid_argument("[" + std::string(op) + "] " + given + ": want " + wanted + ".");
}

}  // namespace

void check_neurons(const char* op, int64_t batch, int64_t n_neurons) {
  if (batch < 0 || batch > kBatchMax) {
    refuse(op, "batch = " + std::to_string(batch), "0 to 65535 rows");
  }
  if (n_neurons < 1) refuse(op, "n_neurons = " + std::to_string(n_neurons), "at least 1");
  if (n_neurons > kInt32Max / (batch > 0 ? batch : 1)) {
    refuse(
        op,
        "batch = " + std::to_string(batch) + " rows of " + std::to_string(n_neurons) + " neurons",
        "fewer than 2^31 in all");
  }
}

void check_width(const char* op, int64_t d) {
  if (d < 1 || d > kInt32Max) refuse(op, "d = " + std::to_string(d), "1 to 2^31 - 1 channels");
}

void check_code(const char* op, int64_t d, Code code) {
  if (!is_known(code)) {
    refuse(op, "code = " + std::to_string(static_cast<int>(code)), "1 to 5, a csfast::Code");
  }
  if (code == Code::kTernary) {
    if (d <= kTernaryWidthMax) return;
    refuse(op, "d = " + std::to_string(d) + " ternary channels",
           "at most " + std::to_string(kTernaryWidthMax) + ", or int32 may overflow");
  }
  const int bits = bits_of(code);
  // |2 U| and |(2^bits - 1) sum q| are both at most this.
  const int64_t per_channel = 2 * 127 * ((int64_t{1} << bits) - 1);
  if (chunks_of(d) * kChunk > kInt32Max / per_channel) {
    refuse(op, "d = " + std::to_string(d) + " channels of " + std::to_string(bits) + " bits",
           "at most " + std::to_string(kInt32Max / per_channel / kChunk * kChunk) +
               ", or int32 may overflow");
  }
}

void check_group_rows(const char* op, const char* name, int rows) {
  if (rows < 1) refuse(op, std::string(name) + " = " + std::to_string(rows), "at least 1");
}

void check_weights(const char* op, const float* weight, int64_t batch) {
  for (int64_t b = 0; b < batch; ++b) {
    if (weight[b] < 0.0f) {
      refuse(op, "votes[" + std::to_string(b) + "] = " + std::to_string(weight[b]), "at least 0");
    }
  }
}

void check_lists(const char* op, const char* name, const int32_t* value, const int32_t* count,
                 int64_t batch, int64_t width) {
  for (int64_t b = 0; b < batch; ++b) {
    if (count[b] < 0 || count[b] > width) {
      refuse(op, std::to_string(count[b]) + " entries of " + name + " in row " + std::to_string(b),
             "0 to " + std::to_string(width));
    }
    int64_t last = -1;
    for (int64_t i = 0; i < count[b]; ++i) {
      const int64_t v = value[b * width + i];
      if (v <= last || v >= width) {
        refuse(op,
               std::string(name) + "[" + std::to_string(b) + ", " + std::to_string(i) +
                   "] = " + std::to_string(v),
               "ascending and distinct, 0 to " + std::to_string(width - 1));
      }
      last = v;
    }
  }
}

}  // namespace csfast
