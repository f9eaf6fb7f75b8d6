#include "csfast/omp.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>

#include "loops.h"
#include "share.h"

namespace csfast {
namespace {

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();
constexpr int32_t kInfinity = 0x7f800000;  // as bits; what is not a number lies above
constexpr int64_t kSlots = 256;  // shares of the batch, each with a workspace; more than cores

[[noreturn]] void refuse(const std::string& given, const std::string& wanted) {
  throw std::invalid_argument("[omp] " + given + ": want " + wanted + ".");
}

void check_sizes(int64_t batch, int64_t n_atoms, int64_t budget_max) {
  if (batch < 0 || batch > kInt32Max) {
    refuse("batch = " + std::to_string(batch), "0 to 2^31 - 1 signals");
  }
  if (n_atoms < 1 || n_atoms > kInt32Max) {
    refuse("n_atoms = " + std::to_string(n_atoms), "1 to 2^31 - 1");
  }
  if (budget_max < 1 || budget_max > n_atoms) {
    refuse("budget_max = " + std::to_string(budget_max),
           "1 to n_atoms = " + std::to_string(n_atoms));
  }
}

void check_share(const char* name, float share) {
  if (!(share >= 0.0f && share <= 1.0f)) {
    refuse(std::string(name) + " = " + std::to_string(share), "0 to 1");
  }
}

void check_range(const char* name, const int32_t* value, int64_t batch, int64_t low, int64_t high,
                 const std::string& range) {
  for (int64_t b = 0; b < batch; ++b) {
    if (value[b] < low || value[b] > high) {
      refuse(std::string(name) + "[" + std::to_string(b) + "] = " + std::to_string(value[b]),
             range);
    }
  }
}

int64_t start_count(const OmpParams& p, int64_t b) {
  if (p.start == nullptr) return 0;
  return p.start_count == nullptr ? p.n_start : p.start_count[b];
}

// What can be looked at on every device.
void check_options(const OmpParams& p) {
  check_sizes(p.batch, p.n_atoms, p.budget_max);
  if (p.n_dictionaries < 1) {
    refuse("n_dictionaries = " + std::to_string(p.n_dictionaries), "at least 1");
  }
  if (p.per_step < 1) refuse("per_step = " + std::to_string(p.per_step), "at least 1");
  if (p.group < 1 || p.group > p.budget_max || p.n_atoms % p.group != 0) {
    refuse("group = " + std::to_string(p.group),
           "a divisor of n_atoms = " + std::to_string(p.n_atoms) +
               " of at most budget_max = " + std::to_string(p.budget_max));
  }
  check_share("tolerance", p.tolerance);
  check_share("correlation_min", p.correlation_min);
  check_share("gain_min", p.gain_min);
  if (!(p.residual_max >= 0.0f && std::isfinite(p.residual_max))) {
    refuse("residual_max = " + std::to_string(p.residual_max), "a finite norm of at least 0");
  }
}

void check_values(const OmpParams& p) {
  check_range("budget", p.budget, p.batch, 0, p.budget_max,
              "0 to budget_max = " + std::to_string(p.budget_max));
  if (p.dictionary != nullptr) {
    check_range("dictionary", p.dictionary, p.batch, 0, p.n_dictionaries - 1,
                "0 to " + std::to_string(p.n_dictionaries - 1));
  }
  if (p.start == nullptr) return;
  if (p.start_count != nullptr) {
    check_range("start_count", p.start_count, p.batch, 0, p.n_start,
                "0 to n_start = " + std::to_string(p.n_start));
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t i = 0; i < start_count(p, b); ++i) {
      const int32_t atom = p.start[b * p.n_start + i];
      if (atom < 0 || atom >= p.n_atoms) {
        refuse(
            "start[" + std::to_string(b) + ", " + std::to_string(i) + "] = " + std::to_string(atom),
            "an atom, 0 to " + std::to_string(p.n_atoms - 1));
      }
    }
  }
}

// Order as the magnitudes do, with what is not a number on top.
int32_t magnitude(float v) {
  return std::bit_cast<int32_t>(v) & kInt32Max;
}

// Four sums at a time, always in the same order: one alone waits for every addition.
double dot(const double* a, const double* b, int32_t n) {
  double sum[4] = {};
  int32_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int32_t k = 0; k < 4; ++k) sum[k] += a[i + k] * b[i + k];
  }
  for (; i < n; ++i) sum[i % 4] += a[i] * b[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// One signal's pursuit after another, and the arrays that it works in.
class Pursuit {
 public:
  Pursuit(const OmpParams& p, char* workspace)
      : p_(p), n_(p.n_atoms), width_(p.budget_max), loops_(loops()) {
    const OmpLayout layout(p.n_atoms, p.budget_max);
    inverse_ = reinterpret_cast<double*>(workspace + layout.inverse);
    partial_ = reinterpret_cast<double*>(workspace + layout.partial);
    along_ = reinterpret_cast<double*>(workspace + layout.along);
    step_ = reinterpret_cast<float*>(workspace + layout.step);
    correlation_ = reinterpret_cast<float*>(workspace + layout.correlation);
    weight_ = reinterpret_cast<float*>(workspace + layout.weight);
    score_ = reinterpret_cast<float*>(workspace + layout.score);
    pick_ = reinterpret_cast<int32_t*>(workspace + layout.pick);
  }

  // Takes atoms of signal b until told to stop.
  OmpStatus run(int64_t b);

  int32_t count() const { return count_; }
  float residual() const { return static_cast<float>(std::ldexp(std::sqrt(left_), exponent_)); }
  float coef(int32_t i) const;

 private:
  enum class Taken { kTaken, kPassedOver, kNotFinite };

  bool load(int64_t b);
  int32_t subtract(int32_t first);
  int32_t pick(int64_t most, int32_t best, double limit);
  Taken take(int64_t atom, int32_t first);
  double square_of(int32_t score) const;

  const OmpParams& p_;
  const int64_t n_, width_;
  const Loops& loops_;
  const float* gram_ = nullptr;  // (n, n)
  int32_t* index_ = nullptr;     // (width)
  double* inverse_;              // (width, width)
  double* partial_;              // (width): <q_t, a> of the atom that is looked at
  double* along_;                // (width): z
  float* step_;                  // (width): what the coefficients change by
  float* correlation_;           // (n)
  float* weight_;                // (n)
  float* score_;                 // (n / group)
  int32_t* pick_;                // (width / group)
  double energy_ = 0.0;
  double left_ = 0.0;   // |r|^2
  double least_ = 1.0;  // share of an atom taken that was not in the span of those before it
  int exponent_ = 0;    // everything is divided by two to this
  int32_t count_ = 0;
};

// Scales the signal by a power of two, so that its largest correlation is in [1, 2).
bool Pursuit::load(int64_t b) {
  const float* correlation = p_.correlation + b * n_;  // (n)
  const float energy = p_.energy[b];
  gram_ = p_.gram + (p_.dictionary == nullptr ? 0 : p_.dictionary[b]) * n_ * n_;
  index_ = p_.index + b * width_;
  count_ = 0;
  int32_t peak = 0;
  for (int64_t j = 0; j < n_; ++j) peak = std::max(peak, magnitude(correlation[j]));
  int32_t worst = 0;
  for (int64_t j = 0; j < n_; ++j) {
    const float square = gram_[j * n_ + j];
    weight_[j] = square == 0.0f ? 0.0f : 1.0f / std::sqrt(square);
    worst = std::max({worst, magnitude(weight_[j]), magnitude(square)});
  }
  if (peak >= kInfinity || worst >= kInfinity || !std::isfinite(energy) || energy < 0.0f) {
    return false;
  }
  exponent_ = peak > 0 ? std::ilogb(std::bit_cast<float>(peak)) : 0;
  const double factor = std::ldexp(1.0, -exponent_);
  for (int64_t j = 0; j < n_; ++j) correlation_[j] = static_cast<float>(correlation[j] * factor);
  energy_ = left_ = energy * factor * factor;
  least_ = 1.0;
  return true;
}

// Brings the correlations up to date with the atoms taken since the first `first`. Gives the best
// score, or that something is not finite.
int32_t Pursuit::subtract(int32_t first) {
  const int32_t rows = first == count_ ? 0 : count_;
  for (int32_t i = 0; i < rows; ++i) {
    const int32_t from = std::max(i, first);
    const double* row = inverse_ + i * width_;  // (width)
    step_[i] = static_cast<float>(dot(row + from, along_ + from, count_ - from));
  }
  const int32_t best = loops_.subtract(gram_, n_, index_, step_, rows, weight_, correlation_);
  if (p_.group == 1 || best >= kInfinity) return best;
  int32_t top = 0;
  for (int64_t g = 0; g < n_ / p_.group; ++g) {
    float sum = 0.0f;
    for (int64_t j = g * p_.group; j < (g + 1) * p_.group; ++j) {
      const float v = correlation_[j] * weight_[j];
      sum += v * v;
    }
    score_[g] = sum;
    top = std::max(top, magnitude(sum));
  }
  return top;
}

double Pursuit::square_of(int32_t score) const {
  const double value = std::bit_cast<float>(score);
  return p_.group == 1 ? value * value : value;
}

// Lists at most `most` groups whose score is above the limit, the best first. Gives their number.
int32_t Pursuit::pick(int64_t most, int32_t best, double limit) {
  const int64_t groups = n_ / p_.group;
  if (p_.group == 1 && most == 1) {
    int32_t atom = 0;
    while (magnitude(correlation_[atom] * weight_[atom]) != best) ++atom;
    pick_[0] = atom;
    return 1;
  }
  if (p_.group == 1) {
    for (int64_t j = 0; j < n_; ++j) score_[j] = std::fabs(correlation_[j] * weight_[j]);
  }
  int32_t picked = 0;
  while (square_of(best) > limit) {
    int32_t g = 0;
    while (magnitude(score_[g]) != best) ++g;
    pick_[picked++] = g;
    if (picked == most || picked == groups) break;
    score_[g] = 0.0f;
    best = 0;
    for (int64_t j = 0; j < groups; ++j) best = std::max(best, magnitude(score_[j]));
  }
  return picked;
}

// Refits with one atom more, or says why not. The correlations know the first `first` atoms.
Pursuit::Taken Pursuit::take(int64_t atom, int32_t first) {
  if (weight_[atom] == 0.0f) return Taken::kPassedOver;
  weight_[atom] = 0.0f;
  const float* row = gram_ + atom * n_;  // (n)
  const int32_t taken = count_;
  std::fill_n(partial_, taken, 0.0);
  for (int32_t i = 0; i < taken; ++i) {
    for (int32_t t = i; t < taken; ++t) {
      partial_[t] += inverse_[i * width_ + t] * row[index_[i]];
    }
  }
  double pivot = row[atom];
  double left_of_it = correlation_[atom];
  for (int32_t t = 0; t < taken; ++t) pivot -= partial_[t] * partial_[t];
  for (int32_t t = first; t < taken; ++t) left_of_it -= partial_[t] * along_[t];
  if (!std::isfinite(pivot) || !std::isfinite(left_of_it)) return Taken::kNotFinite;
  const double share = pivot / row[atom];
  if (share * least_ <= kPivot) return Taken::kPassedOver;
  least_ = std::min(least_, share);

  const double scale = 1.0 / std::sqrt(pivot);
  for (int32_t i = 0; i < taken; ++i) {
    double* inverse = inverse_ + i * width_;  // (width)
    inverse[taken] = -scale * dot(inverse + i, partial_ + i, taken - i);
  }
  inverse_[taken * width_ + taken] = scale;
  along_[taken] = left_of_it * scale;
  index_[taken] = static_cast<int32_t>(atom);
  left_ = std::max(left_ - along_[taken] * along_[taken], 0.0);
  ++count_;
  return Taken::kTaken;
}

OmpStatus Pursuit::run(int64_t b) {
  if (!load(b)) return OmpStatus::kNotFinite;
  if (energy_ == 0.0) return OmpStatus::kZero;
  const int32_t budget = p_.budget[b];
  for (int64_t i = 0; i < start_count(p_, b) && count_ < budget; ++i) {
    if (take(p_.start[b * p_.n_start + i], 0) == Taken::kNotFinite) return OmpStatus::kNotFinite;
  }
  int32_t first = 0;  // atoms before the last step
  double before = std::numeric_limits<double>::infinity();
  const double residual = std::ldexp(p_.residual_max, -exponent_);
  const double last = std::max(p_.tolerance * energy_, residual * residual);
  const double share = p_.correlation_min;
  const double limit = std::max(kNothing, share * share) * energy_;
  for (;;) {
    if (left_ <= last) return OmpStatus::kConverged;
    if (before - left_ < p_.gain_min * energy_) return OmpStatus::kNoGain;
    const int64_t most = std::min(p_.per_step, (budget - count_) / p_.group);
    if (most == 0) return OmpStatus::kBudget;
    const int32_t best = subtract(first);
    if (best >= kInfinity) return OmpStatus::kNotFinite;
    if (square_of(best) <= limit) return OmpStatus::kConverged;
    const int32_t picked = pick(most, best, limit);
    first = count_;
    before = left_;
    for (int32_t i = 0; i < picked; ++i) {
      for (int64_t j = pick_[i] * p_.group; j < (pick_[i] + 1) * p_.group; ++j) {
        if (take(j, first) == Taken::kNotFinite) return OmpStatus::kNotFinite;
      }
    }
    if (count_ == first) return OmpStatus::kDependent;
  }
}

float Pursuit::coef(int32_t i) const {
  const double sum = dot(inverse_ + i * width_ + i, along_ + i, count_ - i);
  return static_cast<float>(std::ldexp(sum, exponent_));
}

void pursue(const OmpParams& p, int64_t b, Pursuit& pursuit) {
  const OmpStatus status = pursuit.run(b);
  const bool failed = status == OmpStatus::kNotFinite;
  const int32_t count = failed ? 0 : pursuit.count();
  int32_t* index = p.index + b * p.budget_max;  // (budget_max)
  std::fill(index + count, index + p.budget_max, 0);
  if (p.coef != nullptr) {
    float* coef = p.coef + b * p.budget_max;  // (budget_max)
    for (int32_t i = 0; i < count; ++i) coef[i] = pursuit.coef(i);
    std::fill(coef + count, coef + p.budget_max, 0.0f);
  }
  p.count[b] = count;
  p.residual[b] = failed ? std::numeric_limits<float>::quiet_NaN() : pursuit.residual();
  p.status[b] = static_cast<int32_t>(status);
}

void omp_on_cpu(const OmpParams& p) {
  const int64_t slots = std::min(p.batch, kSlots);
  const int64_t bytes = OmpLayout(p.n_atoms, p.budget_max).bytes;
#pragma omp parallel for schedule(dynamic) if (p.batch * p.n_atoms * 4 > kBytesAlone)
  for (int64_t slot = 0; slot < slots; ++slot) {
    Pursuit pursuit(p, static_cast<char*>(p.workspace) + slot * bytes);
    for (int64_t b = slot; b < p.batch; b += slots) pursue(p, b, pursuit);
  }
}

}  // namespace

namespace {

// What a kernel is like, for the choice. Registers follow from the largest block, see
// cuda/omp/chip.cuh.
struct Shape {
  OmpKernel kernel;
  int atoms, held, registers, threads_max;
  bool spills;
};
constexpr Shape kShapes[] = {
    // All rows in registers, and once more in shared memory: the first wherever it fits, as on an
    // H100 it was at every size of docs/kernels.md.
    {OmpKernel::kQuad, 4, kOmpQuadBudget, 255, kOmpQuadThreadsMax, false},
    // Of two that cost the same, the first.
    {OmpKernel::kFlat, 4, kOmpHeldFlat, 128, 512, false},
    {OmpKernel::kDeep, 8, kOmpHeldDeep, 255, 256, true},
    {OmpKernel::kWide, 8, 0, 128, 512, true},
};

// In the order of OmpKernel.
constexpr std::string_view kNames[] = {"", "general", "flat", "deep", "wide", "quad"};

std::string_view name_of(OmpKernel kernel) {
  return kNames[static_cast<int>(kernel)];
}

// The mean over t in [0, n) of how many of the rows [first, first + count) lie below t.
double mean_below(int64_t n, int64_t first, int64_t count) {
  const auto sum = [](int64_t m) { return m > 0 ? m * (m - 1) / 2 : 0; };
  return static_cast<double>(sum(n - first) - sum(n - first - count)) / static_cast<double>(n);
}

// Cycles of a processor that an atom taken costs, roughly: what bounds it of instructions, shared
// memory, L2 and, with `at_work` problems at a time, the chain from one atom to the next.
// Instructions are counted in the compiled kernels, the rest is what others measured on Hopper.
// Good for comparing plans, not for more.
double cost(const OmpPlan& plan, int64_t budget_max, int64_t at_work) {
  constexpr double kInstructions = 300;  // of a warp, beside those for rows
  constexpr double kIssue = 4;           // a cycle
  constexpr double kChain = 500;         // cycles that wait for a barrier and for a row of gram
  constexpr double kSpilled = 100;       // cycles that wait for a row from L2, some being under way
  constexpr double kShared = 128;        // bytes a cycle
  constexpr double kL2 = 20;             // bytes a cycle, a processor's part
  const double held = mean_below(budget_max, 0, plan.held);
  const double shared = mean_below(budget_max, plan.held, plan.rows_shared);
  const double spilled = mean_below(budget_max, plan.held + plan.rows_shared, plan.rows_spilled);
  const double bytes = static_cast<double>(OmpChipLayout::row_bytes(plan));  // of a row
  const double loads = 2 + plan.atoms / 4;
  const double instructions =
      kInstructions + held * (plan.atoms + 1) + (shared + spilled) * (plan.atoms + loads);
  const double chain = kChain + 1.5 * instructions + spilled * kSpilled;
  return std::max({chain / static_cast<double>(at_work), plan.threads / 32 * instructions / kIssue,
                   shared * bytes / kShared, spilled * bytes / kL2});
}

}  // namespace

OmpKernel parse_omp_design(std::string_view name) {
  for (size_t i = 0; i < std::size(kNames); ++i) {
    if (name == kNames[i]) return static_cast<OmpKernel>(i);
  }
  refuse("design '" + std::string(name) + "'", "general, flat, deep, wide, quad or nothing");
}

OmpPlan choose_omp(int64_t batch, int64_t n_atoms, int64_t budget_max, bool single,
                   const OmpDevice& device, OmpKernel asked) {
  constexpr int64_t kReserved = 1024;  // bytes that a processor keeps of every block's share
  constexpr int64_t kFactorShared = 16 << 10;  // bytes: two rows of 2048 atoms
  constexpr int64_t kBlocksMax = 32;           // a processor
  check_sizes(batch, n_atoms, budget_max);
  if (device.processors < 1 || device.threads < kOmpGeneralThreads) {
    refuse("a device of " + std::to_string(device.processors) + " processors of " +
               std::to_string(device.threads) + " threads",
           "at least one of at least " + std::to_string(kOmpGeneralThreads));
  }
  const int64_t waves = (batch + device.processors - 1) / device.processors;
  OmpPlan best{};
  double least = std::numeric_limits<double>::infinity();
  for (const Shape& shape : kShapes) {
    const bool is_quad = shape.kernel == OmpKernel::kQuad;
    const bool is_auto = asked == OmpKernel::kAuto && (single || !is_quad);
    if (!is_auto && asked != shape.kernel) continue;
    if (is_quad && (n_atoms > kOmpQuadAtoms || n_atoms % 4 != 0 || budget_max > kOmpQuadBudget)) {
      continue;
    }
    const int64_t per_warp = 32 * shape.atoms;
    const int64_t threads = (n_atoms + per_warp - 1) / per_warp * 32;
    if (threads > std::min<int64_t>(shape.threads_max, device.registers / shape.registers))
      continue;
    OmpPlan plan{};
    plan.kernel = shape.kernel;
    plan.threads = static_cast<int>(threads);
    plan.atoms = shape.atoms;
    plan.held = shape.held;
    plan.factor_shared = !is_quad && OmpChipLayout::factor_bytes(budget_max) <= kFactorShared;
    const int64_t rows = std::max<int64_t>(budget_max - shape.held, 0);
    const int64_t beside = is_quad
                               ? kOmpQuadShared + kOmpQuadBudget * OmpChipLayout::row_bytes(plan)
                               : OmpChipLayout(plan, budget_max).shared;
    const int64_t room = device.shared_per_block - beside;
    if (room < 0) continue;
    plan.rows_shared = static_cast<int>(std::min(rows, room / OmpChipLayout::row_bytes(plan)));
    plan.rows_spilled = static_cast<int>(rows - plan.rows_shared);
    if (plan.rows_spilled > 0 && !shape.spills) continue;
    const OmpChipLayout layout(plan, budget_max);
    plan.shared = is_quad ? beside : layout.shared;
    plan.resident = static_cast<int>(std::min(
        {device.shared_per_processor / (plan.shared + kReserved),
         device.registers / (threads * shape.registers), device.threads / threads, kBlocksMax}));
    if (plan.resident == 0) continue;
    plan.blocks = static_cast<int>(std::min<int64_t>(batch, plan.resident * device.processors));
    plan.workspace = is_quad ? 0 : plan.blocks * layout.workspace;
    if (is_quad) return plan;
    const int64_t at_work = std::max<int64_t>(std::min<int64_t>(plan.resident, waves), 1);
    if (cost(plan, budget_max, at_work) >= least) continue;
    least = cost(plan, budget_max, at_work);
    best = plan;
  }
  if (best.kernel != OmpKernel::kAuto) return best;
  if (asked != OmpKernel::kAuto && asked != OmpKernel::kGeneral) {
    refuse("design " + std::string(name_of(asked)) + " for " + std::to_string(n_atoms) +
               " atoms and budget_max = " + std::to_string(budget_max),
           asked == OmpKernel::kQuad
               ? "a multiple of 4 of at most " + std::to_string(kOmpQuadAtoms) +
                     " atoms, a budget of at most " + std::to_string(kOmpQuadBudget) +
                     ", and a device with room for both"
               : "what fits the registers and shared memory of a processor");
  }

  best.kernel = OmpKernel::kGeneral;
  best.threads = kOmpGeneralThreads;
  best.resident = device.threads / kOmpGeneralThreads;
  best.blocks = static_cast<int>(std::min<int64_t>(batch, best.resident * device.processors));
  best.workspace = best.blocks * OmpLayout(n_atoms, budget_max).bytes;
  return best;
}

std::string describe(const OmpPlan& plan) {
  std::string text(name_of(plan.kernel));
  text += ": " + std::to_string(plan.blocks) + " blocks of " + std::to_string(plan.threads) +
          " threads, " + std::to_string(plan.resident) + " a processor; ";
  if (plan.kernel != OmpKernel::kGeneral) {
    text += "rows: " + std::to_string(plan.held) + " in registers, " +
            std::to_string(plan.rows_shared) + " in shared memory, " +
            std::to_string(plan.rows_spilled) + " in the workspace; " +
            (plan.kernel == OmpKernel::kQuad ? "all once more in shared memory"
             : plan.factor_shared            ? "R in shared memory"
                                             : "R in the workspace") +
            "; " + std::to_string(plan.shared) + " bytes of shared memory; ";
  }
  return text + std::to_string(plan.workspace) + " bytes of workspace";
}

int64_t omp_workspace(int64_t batch, int64_t n_atoms, int64_t budget_max, OmpKernel design,
                      Device device) {
  check_sizes(batch, n_atoms, budget_max);
  if (device == Device::kCuda) return cuda::omp_workspace(batch, n_atoms, budget_max, design);
  return std::min(batch, kSlots) * OmpLayout(n_atoms, budget_max).bytes;
}

void omp(const OmpParams& p, Device device, Stream stream) {
  check_options(p);
  if (p.design == OmpKernel::kQuad && (p.per_step != 1 || p.group != 1)) {
    refuse("design " + std::string(name_of(p.design)) + " with per_step = " +
               std::to_string(p.per_step) + " and group = " + std::to_string(p.group),
           "one atom a step for it, or another design");
  }
  if (device == Device::kCpu) check_values(p);
  if (p.batch == 0) return;
  device == Device::kCuda ? cuda::omp(p, stream) : omp_on_cpu(p);
}

}  // namespace csfast
