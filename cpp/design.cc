#include "csfast/design.h"

#include <algorithm>
#include <charconv>
#include <stdexcept>

namespace csfast {
namespace {

const char* name_of(Path path) {
  switch (path) {
    case Path::kAuto:
      return "auto";
    case Path::kGeneral:
      return "general";
    case Path::kList:
      return "list";
    case Path::kRange:
      return "range";
    case Path::kBatch:
      return "batch";
  }
  return "unknown";
}

const char* name_of(Loads loads) {
  return loads == Loads::kBulk ? "bulk" : loads == Loads::kRegister ? "register" : "auto";
}

}  // namespace

Design parse_design(const char* op, std::string_view words) {
  Design design;
  const auto fail = [&](std::string_view word) {
    throw std::invalid_argument(std::string("[") + op + "] design has " + std::string(word) +
                                ": want general, list, range or batch; register or bulk; blocks=N; "
                                "portable; each once.");
  };
  while (!words.empty()) {
    const size_t length = std::min(words.find(' '), words.size());
    const std::string_view word = words.substr(0, length);
    words.remove_prefix(std::min(length + 1, words.size()));
    bool is_known = false;
    for (const Path path : {Path::kGeneral, Path::kList, Path::kRange, Path::kBatch}) {
      if (word != name_of(path) || design.path != Path::kAuto) continue;
      design.path = path;
      is_known = true;
      break;
    }
    for (const Loads loads : {Loads::kRegister, Loads::kBulk}) {
      if (word != name_of(loads) || design.loads != Loads::kAuto) continue;
      design.loads = loads;
      is_known = true;
      break;
    }
    constexpr std::string_view kBlocks = "blocks=";
    if (word.starts_with(kBlocks) && design.blocks == 0) {
      const std::string_view number = word.substr(kBlocks.size());
      const char* end = number.data() + number.size();
      const auto [stop, error] = std::from_chars(number.data(), end, design.blocks);
      is_known =
          error == std::errc{} && stop == end && design.blocks >= 1 && design.blocks <= kBlocksMax;
    }
    if (word == "portable" && !design.portable) is_known = design.portable = true;
    if (!is_known) fail(word);
  }
  return design;
}

std::string to_string(const Chosen& chosen) {
  std::string text = name_of(chosen.path);
  if (chosen.path != Path::kGeneral) text += std::string(" ") + name_of(chosen.loads);
  if (chosen.overlaps) text += " overlapping";
  if (chosen.blocks > 0) text += " blocks=" + std::to_string(chosen.blocks);
  if (chosen.shares > 0) text += " shares=" + std::to_string(chosen.shares);
  if (chosen.vectors > 0) {
    text += " group_threads=" + std::to_string(chosen.group_threads) +
            " vectors=" + std::to_string(chosen.vectors);
  }
  return text;
}

}  // namespace csfast
