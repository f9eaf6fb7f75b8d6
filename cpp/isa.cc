#include "csfast/isa.h"

#include <cstdlib>
#include <string>
#include <string_view>

#include "csfast/types.h"
#include "loops.h"

namespace csfast {
namespace {

const Loops& choose() {
  const char* asked = std::getenv("CSFAST_ISA");
  const std::string_view name = asked == nullptr ? "" : asked;
  if (name == base::kLoops.name) return base::kLoops;
  const Loops* best = avx512::loops();
  if (name.empty()) return best != nullptr ? *best : base::kLoops;
  if (name != "avx512") {
    throw BackendError("[isa] CSFAST_ISA = " + std::string(name) + ": want base or avx512.");
  }
  if (best == nullptr) {
    throw BackendError(
        "[isa] CSFAST_ISA = avx512: want a processor with AVX-512 F, BW, DQ, VL, VNNI and BF16, "
        "and this one lacks some.");
  }
  return *best;
}

}  // namespace

const Loops& loops() {
  static const Loops& chosen = choose();
  return chosen;
}

const char* isa() {
  return loops().name;
}

}  // namespace csfast
