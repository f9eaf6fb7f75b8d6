// What a pursuit decides, the same for every kernel of omp: which atoms come next and when it ends.
//
// An engine is how a kernel holds a problem and works on it. Every thread of the block calls its
// functions, all with equal arguments, and gets equal values:
//
//   kSingle                                       a step takes one atom, scored alone
//   bool load(const OmpParams&, int b)            the problem; false if something is not finite
//   Taken take(int atom)                          refits with one atom more, or says why not
//   unsigned best()                               bits of the best score, what is no number on top
//   int pick(int most, Sum limit, unsigned)       groups with a score above limit, at most `most`
//   int picked(int i)                             the i-th of them
//   Sum energy, left, gained                      |y|^2, |r|^2, and by how much takes lower it
//                                                 (a step sets it to 0, or a take does if kSingle)
//   int count, exponent                           atoms taken; the power of two that the signal has
//                                                 been divided by
//
// Scores are |<a_j, r>| / |a_j|, or for groups of several atoms the sum of their squares.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/warp.cuh"
#include "csfast/omp.h"

namespace csfast::cuda {

enum class Taken { kTaken, kPassedOver, kNotFinite, kEnded };

inline constexpr unsigned kInfinity = 0x7f800000u;  // as bits; what is not a number lies above

// Orders as the magnitudes do, with what is not a number on top.
__device__ __forceinline__ unsigned magnitude(float v) {
  return __float_as_uint(v) & 0x7fffffffu;
}

// 1 / |a| of an atom of squared norm `square`, 0 for one without norm.
__device__ __forceinline__ float weight_of(float square) {
  return square == 0.0f ? 0.0f : __fdiv_rn(1.0f, __fsqrt_rn(square));
}

// Two to the power of e, a normal number.
__device__ __forceinline__ double power_of_two(int e) {
  return __longlong_as_double((1023ll + e) << 52);
}

// The e of the largest power of two that is not above a finite v > 0, given by its bits. A float
// that is not normal is normal as a double.
__device__ __forceinline__ int exponent_of(unsigned v) {
  return static_cast<int>(__double_as_longlong(__uint_as_float(v)) >> 52) - 1023;
}

// What ends a pursuit, once its problem is loaded.
template <typename Sum>
struct Limits {
  int budget;  // atoms
  Sum last;    // of |r|^2, that ends it
  Sum gain;    // of a step, that does not
  Sum limit;   // of a score, that ends it
  int starts;  // atoms to start with
};

template <typename Engine>
__device__ __forceinline__ auto limits_of(const Engine& engine, const OmpParams& p, int b) {
  using Sum = decltype(engine.energy);
  Limits<Sum> limits;
  limits.budget = min(max(p.budget[b], 0), static_cast<int>(p.budget_max));
  const double residual = p.residual_max * power_of_two(-engine.exponent);
  limits.last = max(p.tolerance * engine.energy, static_cast<Sum>(residual * residual));
  limits.gain = p.gain_min * engine.energy;
  const double share = p.correlation_min;
  const double square = max(kNothing, share * share) * engine.energy;
  limits.limit = static_cast<Sum>(p.group == 1 ? sqrt(square) : square);
  limits.starts = p.start == nullptr ? 0 : static_cast<int>(p.n_start);
  if (p.start_count != nullptr) limits.starts = min(max(p.start_count[b], 0), limits.starts);
  return limits;
}

template <typename Engine>
__device__ __forceinline__ OmpStatus pursue(Engine& engine, const OmpParams& p, int b) {
  if (!engine.load(p, b)) return OmpStatus::kNotFinite;
  if (engine.energy == 0) return OmpStatus::kZero;
  const auto [budget, last, gain, limit, starts] = limits_of(engine, p, b);

  // The first step is the start, which no rule ends.
  for (int step = 0;; ++step) {
    int picked = starts;
    int group = 1;
    if (step > 0) {
      if (engine.left <= last) return OmpStatus::kConverged;
      if (engine.gained < gain) return OmpStatus::kNoGain;
      int most = min(1, budget - engine.count);
      if constexpr (!Engine::kSingle) {
        group = static_cast<int>(p.group);
        most = static_cast<int>(min(p.per_step, int64_t{(budget - engine.count) / group}));
      }
      if (most == 0) return OmpStatus::kBudget;
      const unsigned best = engine.best();
      if (best >= kInfinity) return OmpStatus::kNotFinite;
      if (__uint_as_float(best) <= limit) return OmpStatus::kConverged;
      picked = engine.pick(most, limit, best);
      engine.gained = 0;
    }
    const int count = engine.count;
    for (int i = 0; i < picked * group; ++i) {
      int atom;
      if (step > 0) {
        atom = engine.picked(i / group) * group + i % group;
      } else {
        atom = p.start[b * p.n_start + i];
        if (atom < 0 || atom >= p.n_atoms || engine.count == budget) continue;
      }
      if (engine.take(atom) == Taken::kNotFinite) return OmpStatus::kNotFinite;
    }
    if (step == 0) {
      engine.gained = gain;
    } else if (engine.count == count) {
      return OmpStatus::kDependent;
    }
  }
}

// The same for one atom a step, with one branch from one atom to the next: each is some 20 cycles
// of the chain. What ends the pursuit at an atom is looked at when that atom has been refitted, as
// if it had been taken, and told apart behind the loop. Of the engine it wants one function more:
//
//   Taken take_or_end(int atom, bool allowed)
//
// It is take(), but if the atom is not allowed, or not taken, count, left and gained stay as they
// are and nothing may follow.
template <typename Engine>
__device__ __forceinline__ OmpStatus pursue_one_by_one(Engine& engine, const OmpParams& p, int b) {
  static_assert(Engine::kSingle);
  if (!engine.load(p, b)) return OmpStatus::kNotFinite;
  if (engine.energy == 0) return OmpStatus::kZero;
  const auto limits = limits_of(engine, p, b);
  for (int i = 0; i < limits.starts; ++i) {
    const int atom = p.start[b * p.n_start + i];
    if (atom < 0 || atom >= p.n_atoms || engine.count == limits.budget) continue;
    if (engine.take(atom) == Taken::kNotFinite) return OmpStatus::kNotFinite;
  }
  engine.gained = limits.gain;
  const auto is_done = [&] {
    return engine.left <= limits.last || engine.gained < limits.gain ||
           engine.count == limits.budget;
  };
  unsigned best = kInfinity - 1;
  Taken taken = Taken::kTaken;
  bool ends = is_done();
  while (!ends) {
    best = engine.best();
    // Of two numbers that are not negative, the greater has the greater bits.
    const bool allowed = best < kInfinity && best > __float_as_uint(limits.limit);
    taken = engine.take_or_end(engine.picked(0), allowed);
    ends = taken != Taken::kTaken || is_done();
  }
  if (best >= kInfinity || taken == Taken::kNotFinite) return OmpStatus::kNotFinite;
  if (taken == Taken::kEnded) return OmpStatus::kConverged;
  if (taken == Taken::kPassedOver) return OmpStatus::kDependent;
  if (engine.left <= limits.last) return OmpStatus::kConverged;
  return engine.gained < limits.gain ? OmpStatus::kNoGain : OmpStatus::kBudget;
}

// What every kernel writes of a problem beside index and coef. By one thread.
__device__ __forceinline__ void write_end(const OmpParams& p, int b, OmpStatus status, int count,
                                          float residual) {
  p.count[b] = count;
  p.residual[b] = status == OmpStatus::kNotFinite ? __uint_as_float(0x7fc00000u) : residual;  // NaN
  p.status[b] = static_cast<int32_t>(status);
}

// What a kernel of omp is given.
struct OmpJob {
  OmpParams asked;
  OmpPlan plan;
  OmpChipLayout layout;
  bool aligned;  // rows of gram and correlation begin at 16 bytes
};

}  // namespace csfast::cuda
