#include "csfast/omp.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

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

void check(const OmpParams& p, Device device) {
  check_sizes(p.batch, p.n_atoms, p.budget_max);
  if (!(p.tolerance >= 0.0f && p.tolerance <= 1.0f)) {
    refuse("tolerance = " + std::to_string(p.tolerance), "0 to 1");
  }
  if (device != Device::kCpu) return;
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.budget[b] < 0 || p.budget[b] > p.budget_max) {
      refuse("budget[" + std::to_string(b) + "] = " + std::to_string(p.budget[b]),
             "0 to budget_max = " + std::to_string(p.budget_max));
    }
  }
}

// Order as the magnitudes do, with what is not a number on top.
int32_t magnitude(float v) {
  return std::bit_cast<int32_t>(v) & std::numeric_limits<int32_t>::max();
}

// One signal's pursuit, and the arrays that it works in.
class Pursuit {
 public:
  Pursuit(const OmpParams& p, char* workspace)
      : n_(p.n_atoms), width_(p.budget_max), gram_(p.gram), tolerance_(p.tolerance) {
    const OmpLayout layout(p.n_atoms, p.budget_max);
    inverse_ = reinterpret_cast<double*>(workspace + layout.inverse);
    partial_ = reinterpret_cast<double*>(workspace + layout.partial);
    coef_ = reinterpret_cast<double*>(workspace + layout.coef);
    step_ = reinterpret_cast<float*>(workspace + layout.step);
    correlation_ = reinterpret_cast<float*>(workspace + layout.correlation);
    weight_ = reinterpret_cast<float*>(workspace + layout.weight);
  }

  // Takes atoms into index until told to stop.
  OmpStatus run(const float* correlation, float energy, int32_t budget, int32_t* index);

  int32_t count() const { return count_; }
  float residual() const { return static_cast<float>(std::ldexp(std::sqrt(left_), exponent_)); }
  float coef(int32_t i) const { return static_cast<float>(std::ldexp(coef_[i], exponent_)); }

 private:
  bool load(const float* correlation, float energy);
  int32_t best_score() const;
  bool take(int64_t atom, int32_t* index);
  void subtract(const int32_t* index);

  const int64_t n_, width_;
  const float* gram_;  // (n, n)
  const double tolerance_;
  double* inverse_;     // (width, width)
  double* partial_;     // (width)
  double* coef_;        // (width)
  float* step_;         // (width): what coef has changed by
  float* correlation_;  // (n)
  float* weight_;       // (n)
  double energy_ = 0.0;
  double left_ = 0.0;  // |r|^2
  int exponent_ = 0;   // everything is divided by two to this
  int32_t count_ = 0;
};

// Scales the signal by a power of two, so that its largest correlation is in [1, 2).
bool Pursuit::load(const float* correlation, float energy) {
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
  return true;
}

int32_t Pursuit::best_score() const {
  int32_t best = 0;
  for (int64_t j = 0; j < n_; ++j) best = std::max(best, magnitude(correlation_[j] * weight_[j]));
  return best;
}

// Refits with one atom more, or says that it depends on those taken.
bool Pursuit::take(int64_t atom, int32_t* index) {
  const float* row = gram_ + atom * n_;  // (n)
  const int32_t taken = count_;
  std::fill_n(partial_, taken, 0.0);
  for (int32_t i = 0; i < taken; ++i) {
    for (int32_t s = i; s < taken; ++s) {
      partial_[s] += inverse_[i * width_ + s] * row[index[i]];
    }
  }
  double pivot = row[atom];
  for (int32_t s = 0; s < taken; ++s) pivot -= partial_[s] * partial_[s];
  if (!(pivot > kPivot * row[atom])) return false;

  const double scale = 1.0 / std::sqrt(pivot);
  const double along = correlation_[atom] * scale;
  for (int32_t i = 0; i < taken; ++i) {
    double sum = 0.0;
    for (int32_t s = i; s < taken; ++s) sum += inverse_[i * width_ + s] * partial_[s];
    inverse_[i * width_ + taken] = -scale * sum;
  }
  inverse_[taken * width_ + taken] = scale;
  coef_[taken] = 0.0;
  for (int32_t i = 0; i <= taken; ++i) {
    const double step = along * inverse_[i * width_ + taken];
    coef_[i] += step;
    step_[i] = static_cast<float>(step);
  }
  index[taken] = static_cast<int32_t>(atom);
  weight_[atom] = 0.0f;
  left_ = std::max(left_ - along * along, 0.0);
  ++count_;
  return true;
}

// Four rows of gram at a time: correlations are then loaded and stored a quarter as often.
void Pursuit::subtract(const int32_t* index) {
  float* c = correlation_;
  int32_t i = 0;
  for (; i + 4 <= count_; i += 4) {
    const float* r0 = gram_ + index[i] * n_;
    const float* r1 = gram_ + index[i + 1] * n_;
    const float* r2 = gram_ + index[i + 2] * n_;
    const float* r3 = gram_ + index[i + 3] * n_;
    const float s0 = step_[i], s1 = step_[i + 1], s2 = step_[i + 2], s3 = step_[i + 3];
    for (int64_t j = 0; j < n_; ++j) {
      c[j] -= (s0 * r0[j] + s1 * r1[j]) + (s2 * r2[j] + s3 * r3[j]);
    }
  }
  for (; i < count_; ++i) {
    const float* row = gram_ + index[i] * n_;
    for (int64_t j = 0; j < n_; ++j) c[j] -= step_[i] * row[j];
  }
}

OmpStatus Pursuit::run(const float* correlation, float energy, int32_t budget, int32_t* index) {
  count_ = 0;
  if (!load(correlation, energy)) return OmpStatus::kNotFinite;
  if (energy == 0.0f) return OmpStatus::kZero;
  for (;;) {
    if (left_ <= tolerance_ * energy_) return OmpStatus::kConverged;
    if (count_ == budget) return OmpStatus::kBudget;
    const int32_t best = best_score();
    if (best >= kInfinity) return OmpStatus::kNotFinite;
    const double score = std::bit_cast<float>(best);
    if (score * score <= kNothing * energy_) return OmpStatus::kConverged;
    int64_t atom = 0;
    while (magnitude(correlation_[atom] * weight_[atom]) != best) ++atom;
    if (!take(atom, index)) return OmpStatus::kDependent;
    subtract(index);
  }
}

void pursue(const OmpParams& p, int64_t b, char* workspace) {
  int32_t* index = p.index + b * p.budget_max;  // (budget_max)
  float* coef = p.coef + b * p.budget_max;      // (budget_max)
  Pursuit pursuit(p, workspace);
  const OmpStatus status =
      pursuit.run(p.correlation + b * p.n_atoms, p.energy[b], p.budget[b], index);
  const bool failed = status == OmpStatus::kNotFinite;
  const int32_t count = failed ? 0 : pursuit.count();
  for (int32_t i = 0; i < count; ++i) coef[i] = pursuit.coef(i);
  std::fill(index + count, index + p.budget_max, 0);
  std::fill(coef + count, coef + p.budget_max, 0.0f);
  p.count[b] = count;
  p.residual[b] = failed ? std::numeric_limits<float>::quiet_NaN() : pursuit.residual();
  p.status[b] = static_cast<int32_t>(status);
}

void omp_on_cpu(const OmpParams& p) {
  const int64_t slots = std::min(p.batch, kSlots);
  const int64_t bytes = OmpLayout(p.n_atoms, p.budget_max).bytes;
#pragma omp parallel for schedule(dynamic) if (p.batch * p.n_atoms * 4 > kBytesAlone)
  for (int64_t slot = 0; slot < slots; ++slot) {
    char* workspace = static_cast<char*>(p.workspace) + slot * bytes;
    for (int64_t b = slot; b < p.batch; b += slots) pursue(p, b, workspace);
  }
}

}  // namespace

int64_t omp_workspace(int64_t batch, int64_t n_atoms, int64_t budget_max, Device device) {
  check_sizes(batch, n_atoms, budget_max);
  const int64_t problems = device == Device::kCuda ? batch : std::min(batch, kSlots);
  return problems * OmpLayout(n_atoms, budget_max).bytes;
}

void omp(const OmpParams& p, Device device, Stream stream) {
  check(p, device);
  if (p.batch == 0) return;
  device == Device::kCuda ? cuda::omp(p, stream) : omp_on_cpu(p);
}

}  // namespace csfast
