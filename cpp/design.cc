#include "csfast/design.h"

#include <algorithm>
#include <charconv>
#include <stdexcept>

#include "csfast/execute.h"

namespace csfast {
namespace {

constexpr int kThreads = 512;              // of a block of kList and kRange, see gather.cuh
constexpr int kWarpThreads = 32;           // threads that share a neuron, at least
constexpr int kColumns = 8;                // of a load of 16 bytes, of two bytes each
constexpr int kVectorsMax = 2;             // loads of a row by one thread
constexpr int64_t kBlockNeurons = 8;       // of a block of kList, when everything is listed
constexpr int kOtherBytes = 24 << 10;      // of shared memory beside ring and list
constexpr int kRowsBytes = 36 << 10;       // of kBatch, beside the list, see rows.cuh
constexpr int kRowsBulkBytes = 152 << 10;  // likewise, with rings
constexpr int64_t kCombineColumns = 512;   // likewise, of the output, of a block
constexpr int64_t kStepNeurons = 16;       // likewise, that are added at once
constexpr int64_t kBatchWidth = 1 << 16;   // channels, what places in a row as int allow
constexpr int64_t kRoomMax = 1 << 20;      // neurons of a block's list, far beyond what fits
constexpr int kRingBytes = 192 << 10;      // likewise

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

bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// Whether loads of 16 bytes bring whole parts of rows.
bool is_vectored(const ExecuteParams& p) {
  return p.form.dtype != DType::kF32 && p.form.d % kColumns == 0 && is_aligned(p.weights.gate) &&
         is_aligned(p.weights.up) && is_aligned(p.weights.down_t) && is_aligned(p.x);
}

void refuse(const std::string& what) {
  throw std::invalid_argument("[execute] design " + what + ".");
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

Chosen choose(const ExecuteParams& p, const Chip& chip, bool senses) {
  const Design& asked = p.design;
  const bool is_new = chip.capability >= 90 && !asked.portable;
  if (asked.loads == Loads::kBulk && !is_new) {
    refuse("has bulk loads at capability " + std::to_string(chip.capability) +
           (asked.portable ? ", portable" : "") + ": want 90 or above, and not portable");
  }
  const Chosen general{.path = Path::kGeneral,
                       .loads = Loads::kRegister,
                       .overlaps = is_new,
                       .blocks = 0,
                       .shares = 0,
                       .group_threads = 0,
                       .vectors = 0,
                       .list_room = 0};
  if (asked.path == Path::kGeneral) return general;

  Chosen chosen = general;
  const auto in_parts = [](int64_t n, int64_t parts) { return (n + parts - 1) / parts; };
  const int64_t loads = in_parts(p.form.d, kColumns);
  const int vectors = loads <= kThreads ? 1 : kVectorsMax;
  const bool is_batch = p.shared && p.batch > 1;
  const bool is_range = senses && vectors == 1 && asked.loads != Loads::kBulk;
  chosen.path = asked.path != Path::kAuto ? asked.path
                : is_batch                ? Path::kBatch
                : is_range                ? Path::kRange
                                          : Path::kList;
  // A tile of more rows than there are is the only one.
  const auto tile_rows = static_cast<int>(std::min<int64_t>(p.tile_rows, p.form.n_neurons));
  const int64_t places = n_tiles_max(p.form.n_neurons, tile_rows) * tile_rows;
  const int64_t most = std::min(chip.n_processors, kBlocksMax);
  const auto list_blocks = [&] {
    return asked.blocks > 0 ? asked.blocks
                            : static_cast<int>(std::min(most, in_parts(places, kBlockNeurons)));
  };
  int64_t room = 0;
  int64_t bytes = kOtherBytes;
  bool fits = is_vectored(p);
  if (chosen.path == Path::kBatch) {
    const int64_t columns = in_parts(p.form.d, kCombineColumns);
    const int64_t wanted = std::max<int64_t>((asked.blocks > 0 ? asked.blocks : most) / columns, 1);
    chosen.blocks = list_blocks();
    chosen.shares = static_cast<int>(std::min(wanted, in_parts(places, kStepNeurons)));
    room = in_parts(places, std::min(chosen.blocks, chosen.shares));
    const bool fits_bulk = is_new && kRowsBulkBytes + room * 4 <= chip.shared_bytes;
    chosen.loads = asked.loads != Loads::kAuto ? asked.loads
                   : fits_bulk                 ? Loads::kBulk
                                               : Loads::kRegister;
    bytes = chosen.loads == Loads::kBulk ? kRowsBulkBytes : kRowsBytes;
    fits = fits && p.shared && p.form.d <= kBatchWidth;
  } else {
    chosen.vectors = vectors;
    chosen.group_threads = kWarpThreads;
    while (int64_t{chosen.group_threads} * chosen.vectors < loads &&
           chosen.group_threads < kThreads) {
      chosen.group_threads *= 2;
    }
    fits = fits && loads <= kVectorsMax * kThreads;
    chosen.loads = asked.loads == Loads::kAuto ? Loads::kRegister : asked.loads;
    if (chosen.loads == Loads::kBulk) bytes += kRingBytes;
    if (chosen.path == Path::kRange) {
      Runs runs = Runs::on(chip, p.form.n_neurons, tile_rows);
      if (asked.blocks > 0) runs.blocks = asked.blocks;
      chosen.blocks = runs.blocks;
      room = runs.tiles_max() * tile_rows;
    } else {
      chosen.blocks = list_blocks();
      room = in_parts(places, chosen.blocks);
    }
  }
  chosen.list_room = static_cast<int>(std::min(room, kRoomMax));
  if (fits && room <= kRoomMax && bytes + room * 4 <= chip.shared_bytes) return chosen;
  if (asked.path == Path::kAuto && is_range) return choose(p, chip);
  if (asked.path == Path::kAuto) return general;
  refuse(
      "is " + to_string(chosen) +
      ": want 16-bit elements, rows at multiples of 16 bytes, d at most 8192, or 65536 for batch, "
      "whose rows share a list, and blocks for lists that fit in shared memory");
  return general;
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
