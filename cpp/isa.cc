#include "csfast/isa.h"

#include <cstdlib>
#include <string>
#include <string_view>

#include "csfast/types.h"
#include "loops.h"

namespace csfast {
namespace {

struct Choice {
  std::string_view name;
  const Loops* loops;  // null where the processor lacks something
  const char* needs;
};

const Loops& choose() {
  const Choice choices[] = {
      // The best first.
      {"avx512", avx512::loops(), "AVX-512 F, BW, DQ, VL, VNNI and BF16"},
      {"avx2", avx2::loops(), "AVX2, FMA and F16C"},
      {"base", &base::kLoops, "nothing"},
  };
  const char* asked = std::getenv("CSFAST_ISA");
  const std::string name = asked == nullptr ? "" : asked;
  for (const Choice& choice : choices) {  // the first that runs, or the one that is named
    if (name.empty() ? choice.loops == nullptr : name != choice.name) continue;
    if (choice.loops == nullptr) {
      throw BackendError("[isa] CSFAST_ISA = " + name + ": want a processor with " + choice.needs +
                         ", and this one lacks some.");
    }
    return *choice.loops;
  }
  throw BackendError("[isa] CSFAST_ISA = " + name + ": want base, avx2 or avx512.");
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
