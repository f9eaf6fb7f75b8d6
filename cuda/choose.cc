// How CUDA goes about an operation: chosen from sizes, addresses and the machine, without a device,
// so that every choice can be tested on any machine. What a kernel takes is in the headers that it
// shares with its kernels, and what these have in the end they assert to be as much.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "csfast/design.h"
#include "csfast/execute.h"
#include "csfast/ffn.h"
#include "csfast/prepared.h"
#include "csfast/select.h"
#include "execute/sizes.h"
#include "ffn/sizes.h"
#include "select/sizes.h"

namespace csfast {
namespace {

using namespace cuda;  // the kernels' sizes

constexpr int64_t kBlockNeurons = 8;      // of a block of kList, when everything is listed
constexpr int64_t kBatchWidth = 1 << 16;  // channels, what places in a row as int allow
constexpr int64_t kRoomMax = 1 << 20;     // neurons of a block's list, far beyond what fits
static_assert(kRingBytes<1> == kRingBytes<kVectorsMax>);

bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// Whether loads of 16 bytes bring whole parts of rows.
bool is_vectored(const ExecuteParams& p) {
  return p.form.dtype != DType::kF32 && p.form.d % kLaneColumns == 0 &&
         is_aligned(p.weights.gate) && is_aligned(p.weights.up) && is_aligned(p.weights.down_t) &&
         is_aligned(p.x);
}

void refuse(const std::string& what) {
  throw std::invalid_argument("[execute] design " + what + ".");
}

// Programmatic launches and bulk copies.
bool is_new(const Design& asked, const Chip& chip) {
  return chip.capability >= 90 && !asked.portable;
}

}  // namespace

Chosen choose(const ExecuteParams& p, const Chip& chip, bool senses) {
  const Design& asked = p.design;
  const bool has_new = is_new(asked, chip);
  if (asked.loads == Loads::kBulk && !has_new) {
    refuse("has bulk loads at capability " + std::to_string(chip.capability) +
           (asked.portable ? ", portable" : "") + ": want 90 or above, and not portable");
  }
  const Chosen general{.path = Path::kGeneral,
                       .loads = Loads::kRegister,
                       .overlaps = has_new,
                       .blocks = 0,
                       .shares = 0,
                       .group_threads = 0,
                       .vectors = 0,
                       .list_room = 0};
  if (asked.path == Path::kGeneral) return general;

  Chosen chosen = general;
  const auto in_parts = [](int64_t n, int64_t parts) { return (n + parts - 1) / parts; };
  const int64_t loads = in_parts(p.form.d, kLaneColumns);
  const int vectors = loads <= kGatherThreads ? 1 : kVectorsMax;
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
  int64_t bytes = kGatherOtherBytes;
  bool fits = is_vectored(p);
  if (chosen.path == Path::kBatch) {
    const int64_t columns = in_parts(p.form.d, kCombineColumns);
    const int64_t wanted = std::max<int64_t>((asked.blocks > 0 ? asked.blocks : most) / columns, 1);
    chosen.blocks = list_blocks();
    chosen.shares = static_cast<int>(std::min(wanted, in_parts(places, kStepNeurons)));
    room = in_parts(places, std::min(chosen.blocks, chosen.shares));
    const bool fits_bulk = has_new && kRowsBulkBytes + room * 4 <= chip.shared_bytes;
    chosen.loads = asked.loads != Loads::kAuto ? asked.loads
                   : fits_bulk                 ? Loads::kBulk
                                               : Loads::kRegister;
    bytes = chosen.loads == Loads::kBulk ? kRowsBulkBytes : kRowsBytes;
    fits = fits && p.shared && p.form.d <= kBatchWidth;
  } else {
    chosen.vectors = vectors;
    chosen.group_threads = kWarp;
    while (int64_t{chosen.group_threads} * chosen.vectors < loads &&
           chosen.group_threads < kGatherThreads) {
      chosen.group_threads *= 2;
    }
    fits = fits && loads <= kVectorsMax * kGatherThreads;
    chosen.loads = asked.loads == Loads::kAuto ? Loads::kRegister : asked.loads;
    if (chosen.loads == Loads::kBulk) bytes += kRingBytes<kVectorsMax>;
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

ChosenSelect choose(const SelectParams& p, const Chip& chip) {
  const Form& form = p.form;
  const int tile_rows = p.decision.tile_rows;
  Runs runs = Runs::on(chip, form.n_neurons, tile_rows);
  if (p.design.blocks > 0) runs.blocks = p.design.blocks;
  const int64_t run_neurons = runs.tiles_max() * tile_rows;
  const int64_t bytes = run_bytes(p.sensor.code, p.batch, form.d, run_neurons);
  // Up to 16 rows, whose elements lie so that 16 bytes of them are read at once.
  const bool fits = p.batch >= 1 && p.batch <= kSenseBatch && form.d % 8 == 0 &&
                    form.d <= kSenseWidth && is_aligned(p.x) && is_aligned(p.sensor.equal) &&
                    bytes + kRunSharedBytes <= chip.shared_bytes;
  ChosenSelect chosen{.one_pass = fits && p.design.path != Path::kGeneral,
                      .overlaps = is_new(p.design, chip),
                      .quantized = p.batch > kOwnRows};
  if (!chosen.one_pass) return chosen;
  chosen.blocks = runs.blocks;
  chosen.run_neurons = static_cast<int>(run_neurons);
  chosen.shared_bytes = static_cast<int>(bytes);
  return chosen;
}

ChosenFfn choose(const FfnParams& p, const Chip& chip) {
  const SelectParams selection = p.selection(nullptr, nullptr, nullptr, nullptr);
  const ChosenSelect select = choose(selection, chip);
  const Chosen execute = choose(p.execution(nullptr, nullptr, nullptr), chip, true);
  ChosenFfn chosen{.select = select, .execute = execute};
  // A cap ranks a list as a whole.
  chosen.piecewise =
      select.one_pass && p.layer.decision.cap == nullptr && execute.path != Path::kGeneral;
  const int64_t bytes = range_bytes(p.layer.sensor.code, p.layer.form.d, select.run_neurons);
  chosen.immediate = chosen.piecewise && p.batch == 1 && execute.path == Path::kRange &&
                     execute.loads == Loads::kRegister && execute.vectors == 1 &&
                     bytes + kRangeOtherBytes <= chip.shared_bytes;
  if (chosen.immediate) chosen.shared_bytes = static_cast<int>(bytes);
  return chosen;
}

std::string to_string(const ChosenFfn& chosen) {
  const char* how = chosen.immediate ? "immediate " : chosen.piecewise ? "piecewise " : "listed ";
  return how + to_string(chosen.execute);
}

std::string to_string(const Prepared& prepared) {
  std::string text;
  for (const Prepared::Part& part : prepared.parts) {
    const Step& step = part.step;
    const int64_t blocks = int64_t{step.grid[0]} * step.grid[1] * step.grid[2];
    text += (text.empty() ? "" : ", ") + std::string(step.name) + " " + std::to_string(blocks) +
            " x " + std::to_string(step.threads);
    if (step.shared_bytes > 0) text += " with " + std::to_string(step.shared_bytes) + " bytes";
  }
  return text;
}

}  // namespace csfast
