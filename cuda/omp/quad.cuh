// Omp of one atom a step, all on the chip: the shortest chain from one atom to the next.
//
// As on_chip (eq. 16), but every row of D is in registers, four rows a quad. Shared memory has them
// once more, atom after atom, so that what an atom taken has of all rows is a few loads of 16 bytes
// that every thread can begin as soon as it knows the atom; no warp publishes more than its best
// atom's entries of the rows since the last whole quad. What does not decide over the next atom is
// done while a row of gram is on its way from the L2 cache. Bound by that chain: two steps of an
// arg-max, one barrier, one load from L2, one of shared memory.
#pragma once

#include <cstddef>

#include "common/warp.cuh"
#include "omp/address.cuh"
#include "omp/early.cuh"
#include "omp/index.cuh"
#include "omp/root.cuh"
#include "omp/rules.cuh"

namespace csfast::cuda {

// What a warp says of its best atom, or of the one that was asked for.
struct alignas(16) OmpQuadSlot {
  unsigned score;  // bits; in load(): of the largest correlation
  int atom;
  int padding[2];
  float4 known;  // <a, r>; |a|^2 less what the span of the atoms taken has of it; 1 / |a|, 0 for
                 // what may not be taken; 0
  float4 open;   // its entries of the rows since the last whole quad, 0 for those to come
};

struct OmpQuadShared {
  OmpQuadSlot slots[2][kOmpQuadThreadsMax / kWarp];
  float along[kOmpQuadBudget];  // z
  float scale[kOmpQuadBudget];  // 1 / the diagonal of R
  int32_t index[kOmpQuadBudget];
  float square[kOmpQuadAtoms];  // the diagonal of gram; a thread touches its own atoms only
  // (pitch, budget / 4): D, atom after atom. Quad q is at place q ^ x, see place_of().
  float4 direction[1];
};
static_assert(offsetof(OmpQuadShared, direction) == kOmpQuadShared);

// A thread has kAtoms neighbouring atoms.
class OnQuads {
 public:
  static constexpr int kAtoms = 4;
  static constexpr bool kSingle = true;

  __device__ explicit OnQuads(const OmpJob& job)
      : job_(job), first_(static_cast<int>(threadIdx.x) * kAtoms), shared_(shared_begin()) {}

  float energy = 0.0f, left = 0.0f, gained = 0.0f;
  int exponent = 0, count = 0;

  __device__ __forceinline__ bool load(const OmpParams& p, int b) {
    const float signal = p.energy[b];
    const int dictionary = p.dictionary == nullptr ? 0 : p.dictionary[b];
    count = quads_ = 0;
    asked_ = -1;
    if (dictionary < 0 || dictionary >= p.n_dictionaries) return false;
    const float* gram = p.gram + int64_t{dictionary} * n() * n();
    float square[kAtoms] = {};
    if (gram != gram_) {
      gram_ = gram;
      column_ = reinterpret_cast<const char*>(gram + column());
      if (first_ < n()) {
#pragma unroll
        for (int e = 0; e < kAtoms; ++e) square[e] = __ldg(gram + int64_t{n() + 1} * (first_ + e));
      }
      store_shared(shared_ + at_square(first_), square);
    } else {
      load_shared(shared_ + at_square(first_), square);
    }
    load_early(p.correlation + int64_t{b} * n() + column(), correlation_);
    unsigned peak = 0;
    unsigned worst = isfinite(signal) && signal >= 0.0f ? 0 : kInfinity;
#pragma unroll
    for (int e = 0; e < kAtoms; ++e) {
      pivot_[e] = square[e];
      weight_[e] = weight_of(pivot_[e]);
      peak = max(peak, magnitude(correlation_[e]));
      worst = max(worst, max(magnitude(weight_[e]), magnitude(pivot_[e])));
    }
    reopen();
    if (worst >= kInfinity) peak = kInfinity;
    peak = best_of(peak, __reduce_max_sync(kFull, peak), first_, {}, {});
    asked_ = -1;  // it was not about what is known of atoms
    if (peak >= kInfinity) return false;

    exponent = peak > 0 ? exponent_of(peak) : 0;
    const double factor = power_of_two(-exponent);
    energy = left = static_cast<float>(signal * factor * factor);
    least_ = 1.0f;
#pragma unroll
    for (int e = 0; e < kAtoms; ++e) {
      correlation_[e] = static_cast<float>(correlation_[e] * factor);
    }
    return true;
  }

  __device__ __forceinline__ Taken take(int atom) {
    if (asked_ != atom) ask(atom);
    return refit<false>(atom, true);
  }

  __device__ __forceinline__ Taken take_or_end(int atom, bool allowed) {
    return refit<true>(atom, allowed);
  }

  __device__ __forceinline__ unsigned best() {
    unsigned score[kAtoms];
    unsigned top = 0;
#pragma unroll
    for (int e = 0; e < kAtoms; ++e) {
      score[e] = magnitude(__fmul_rn(correlation_[e], weight_[e]));
      top = max(top, score[e]);
    }
    const unsigned of_warp = __reduce_max_sync(kFull, top);
    // While that goes on.
    int own = kAtoms - 1;
    float4 known = known_of(own), open = open_of(own);
#pragma unroll
    for (int e = kAtoms - 2; e >= 0; --e) {
      const bool is_it = score[e] == top;
      own = is_it ? e : own;
      known = choose(is_it, known_of(e), known);
      open = choose(is_it, open_of(e), open);
    }
    return best_of(top, of_warp, first_ + own, known, open);
  }

  __device__ __forceinline__ int picked(int) const { return found_; }

  // The first warp writes the problem out: x = R^-1 z, from the last coefficient to the first. Lane
  // t has what belongs to atom t, as long as it is a lane.
  __device__ __forceinline__ void write(const OmpParams& p, int b, OmpStatus status) {
    static_assert(kOmpQuadBudget <= kWarp);
    const int kept = status == OmpStatus::kNotFinite ? 0 : count;
    const bool factored = p.coef != nullptr;
    if (factored) {
      if (count > 4 * quads_) store_quad();
      __syncthreads();  // orders D
    }
    if (threadIdx.x >= kWarp) return;
    const int lane = static_cast<int>(threadIdx.x);
    const int width = static_cast<int>(p.budget_max);
    __syncwarp();  // orders along, scale and index
    float along = 0.0f, scale = 0.0f, atom = 0.0f;
    if (lane < kept) {
      load_shared(shared_ + at_word(offsetof(OmpQuadShared, along), lane), along);
      load_shared(shared_ + at_word(offsetof(OmpQuadShared, scale), lane), scale);
      load_shared(shared_ + at_word(offsetof(OmpQuadShared, index), lane), atom);
    }
    const int index = __float_as_int(atom);
    const double unit = power_of_two(status == OmpStatus::kNotFinite ? 0 : exponent);
    if (lane < width) p.index[int64_t{b} * width + lane] = index;
    if (lane == 0) write_end(p, b, status, kept, static_cast<float>(__fsqrt_rn(left) * unit));
    if (!factored) return;

    double solved = along;
    for (int t = kept - 1; t > 0; --t) {
      const int other = __shfl_sync(kFull, index, t);
      const double x = __shfl_sync(kFull, solved * scale, t);
      float entry = 0.0f;
      if (lane < t) load_shared(place_of(other, lane / 4) + 4 * (lane % 4), entry);
      if (lane < t) solved -= entry * x;
    }
    if (lane < width) p.coef[int64_t{b} * width + lane] = static_cast<float>(solved * scale * unit);
  }

 private:
  // Of the atom that chosen_ is about.
  template <bool kEnds>
  __device__ __forceinline__ Taken refit(int atom, bool allowed) {
    asked_ = -1;  // what the slot says holds until an atom is taken
    // The row of gram is under way while everything else goes on.
    float row[kAtoms], known[4], open[4], closed[4];
    load_early(own_of_row(atom), row);
    load_shared(chosen_ + kKnown, known);
    load_shared(chosen_ + kOpen, open);
    if (quads_ > 0) load_shared(place_of(atom, 0), closed);
    const float correlation = known[0], pivot = known[1], weight = known[2];
    const float share = pivot * weight * weight;
    const bool is_finite = isfinite(pivot) && isfinite(correlation);
    // A share of an atom that may not be taken is 0, or not a number.
    const bool is_good = is_finite && share * least_ > static_cast<float>(kPivot);
    const Taken taken = !allowed                       ? Taken::kEnded
                        : is_good                      ? Taken::kTaken
                        : weight != 0.0f && !is_finite ? Taken::kNotFinite
                                                       : Taken::kPassedOver;
    if constexpr (!kEnds) {
      if (taken == Taken::kNotFinite) return taken;
      forbid(atom);
      if (taken == Taken::kPassedOver) return taken;
    } else {
      forbid(atom);
    }
    const bool is_taken = taken == Taken::kTaken;
    least_ = fminf(least_, share);
    const float scale = reciprocal_root(pivot);
    const float along = correlation * scale;
    left = is_taken ? fmaxf(__fmaf_rn(-along, along, left), 0.0f) : left;
    gained = is_taken ? __fmul_rn(along, along) : gained;

    float sum[kAtoms] = {};
    if (quads_ > 0) add_closed(atom, closed, sum);
    add(open, open_, sum);
    if (count == 4 * (quads_ + 1)) close();
    if (threadIdx.x == 0) {
      store_shared(shared_ + at_word(offsetof(OmpQuadShared, along), count), along);
      store_shared(shared_ + at_word(offsetof(OmpQuadShared, scale), count), scale);
      store_shared(shared_ + at_word(offsetof(OmpQuadShared, index), count), __int_as_float(atom));
    }
    const int turn = count - 4 * quads_;
    count += is_taken ? 1 : 0;

#pragma unroll
    for (int e = 0; e < kAtoms; ++e) {
      const float d = (row[e] - sum[e]) * scale;
      correlation_[e] = __fmaf_rn(-along, d, correlation_[e]);
      pivot_[e] = __fmaf_rn(-d, d, pivot_[e]);
#pragma unroll
      for (int i = 0; i < 4; ++i) open_[i][e] = turn == i ? d : open_[i][e];
    }
    return taken;
  }

  static constexpr int kQuads = kOmpQuadBudget / 4 - 1;  // the last one stays open
  static constexpr unsigned kKnown = offsetof(OmpQuadSlot, known);
  static constexpr unsigned kOpen = offsetof(OmpQuadSlot, open);
  static constexpr unsigned kPlace = sizeof(float4);
  static constexpr unsigned kPitch = kPlace * kOmpQuadBudget / 4;  // of an atom's rows
  static constexpr unsigned kDirection = offsetof(OmpQuadShared, direction);
  static_assert(kPitch == 128 && kDirection % kPitch == 0, "places are told apart by bits");
  static constexpr unsigned kSlot = sizeof(OmpQuadSlot);

  __device__ int n() const { return static_cast<int>(job_.asked.n_atoms); }
  __device__ unsigned warps() const { return static_cast<unsigned>(job_.plan.threads) / kWarp; }
  __device__ static unsigned at_square(int atom) {
    return static_cast<unsigned>(offsetof(OmpQuadShared, square)) +
           4u * static_cast<unsigned>(atom);
  }
  __device__ static unsigned at_word(size_t array, int i) {
    return static_cast<unsigned>(array) + 4u * static_cast<unsigned>(i);
  }

  // Where an atom's entries of the rows of a quad are. Eight threads that store a quad at once, or
  // lanes that load what they stored, so meet eight times four different banks.
  __device__ __forceinline__ SharedAddress place_of(int atom, int quad) const {
    const unsigned turn = static_cast<unsigned>(atom) / kAtoms % 8;
    return (shared_ + kDirection + static_cast<unsigned>(atom) * kPitch + turn * kPlace) ^
           static_cast<unsigned>(quad) * kPlace;
  }

  // Where this thread's atoms are in a row. Those beyond the last atom are the last ones' once
  // more, with no weight: what they are is finite where that is.
  __device__ __forceinline__ int column() const { return min(first_, n() - kAtoms); }
  __device__ __forceinline__ const float* own_of_row(int atom) const {
    return reinterpret_cast<const float*>(column_ + uint64_t{static_cast<unsigned>(atom)} *
                                                        static_cast<unsigned>(4 * n()));
  }

  __device__ __forceinline__ void forbid(int atom) {
#pragma unroll
    for (int e = 0; e < kAtoms; ++e) weight_[e] = first_ + e == atom ? 0.0f : weight_[e];
  }

  __device__ __forceinline__ float4 known_of(int e) const {
    return {correlation_[e], pivot_[e], weight_[e], 0.0f};
  }
  __device__ __forceinline__ float4 open_of(int e) const {
    return {open_[0][e], open_[1][e], open_[2][e], open_[3][e]};
  }
  __device__ __forceinline__ static float4 choose(bool first, const float4& a, const float4& b) {
    return {first ? a.x : b.x, first ? a.y : b.y, first ? a.z : b.z, first ? a.w : b.w};
  }

  // sum += the rows of a quad, each times its own w.
  __device__ __forceinline__ static void add(const float (&w)[4], const float (&rows)[4][kAtoms],
                                             float (&sum)[kAtoms]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < kAtoms; ++e) sum[e] = __fmaf_rn(w[i], rows[i][e], sum[e]);
    }
  }

  // The same for all whole quads, the next one's w on their way; those of the first are given.
  __device__ __forceinline__ void add_closed(int atom, const float (&given)[4],
                                             float (&sum)[kAtoms]) const {
    const SharedAddress first = place_of(atom, 0);
    float w[kQuads][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[0][i] = given[i];
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      if (q >= quads_) break;
      if (q + 1 < kQuads && q + 1 < quads_) load_shared(first ^ (q + 1) * kPlace, w[q + 1]);
      add(w[q], closed_[q], sum);
    }
  }

  __device__ __forceinline__ void reopen() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < kAtoms; ++e) open_[i][e] = 0.0f;
    }
  }

  // The open quad to shared memory. Others read it behind the barrier of the next best_of().
  __device__ __forceinline__ void store_quad() const {
#pragma unroll
    for (int e = 0; e < kAtoms; ++e) {
      const float entries[4] = {open_[0][e], open_[1][e], open_[2][e], open_[3][e]};
      store_shared(place_of(first_ + e, quads_), entries);
    }
  }

  __device__ __forceinline__ void close() {
    store_quad();
    at_index<0, kQuads>(quads_, [&]<int q>() {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int e = 0; e < kAtoms; ++e) {
          // Or the compiler moves the rows of all quads about, to choose among them.
          asm volatile("mov.f32 %0, %1;" : "=f"(closed_[q][i][e]) : "f"(open_[i][e]));
        }
      }
    });
    ++quads_;
    reopen();
  }

  __device__ __forceinline__ SharedAddress slot(unsigned i) const {
    return shared_ + kSlot * (parity_ * (kOmpQuadThreadsMax / kWarp) + i);
  }

  // Finds the best of all threads' scores, ties to the lower atom, which is then found_, and
  // chosen_ the slot that says what is known of it. Lanes and warps ascend as their atoms do.
  __device__ __forceinline__ unsigned best_of(unsigned score, unsigned of_warp, int atom,
                                              const float4& known, const float4& open) {
    const unsigned lane = threadIdx.x % kWarp;
    const unsigned those = __ballot_sync(kFull, score == of_warp);
    const bool is_first = score == of_warp && (those & ((1u << lane) - 1)) == 0;
    publish(is_first, slot(threadIdx.x / kWarp), score, atom, known, open);
    __syncthreads();  // these slots were read last before the barrier of the last best_of() or
                      // ask()
    unsigned said = 0;
    int about = INT32_MAX;
    if (lane < warps()) load_shared(slot(lane), said, about);
    const unsigned best = __reduce_max_sync(kFull, said);
    found_ = __reduce_min_sync(kFull, said == best ? about : INT32_MAX);
    chosen_ = slot(static_cast<unsigned>(found_) / (kAtoms * kWarp));
    asked_ = found_;
    parity_ ^= 1;
    return best;
  }

  __device__ __forceinline__ static void publish(bool when, SharedAddress slot, unsigned score,
                                                 int atom, const float4& known,
                                                 const float4& open) {
    const float4 said = {__uint_as_float(score), __int_as_float(atom), 0.0f, 0.0f};
    store_shared_if(when, slot, said);
    store_shared_if(when, slot + kKnown, known);
    store_shared_if(when, slot + kOpen, open);
  }

  // Lets the thread that has an atom say what is known of it.
  __device__ __forceinline__ void ask(int atom) {
    const SharedAddress first = slot(0);
#pragma unroll
    for (int e = 0; e < kAtoms; ++e) {
      publish(first_ + e == atom, first, 0, atom, {correlation_[e], pivot_[e], weight_[e], 0.0f},
              {open_[0][e], open_[1][e], open_[2][e], open_[3][e]});
    }
    __syncthreads();  // as in best_of()
    chosen_ = first;
    asked_ = atom;
    parity_ ^= 1;
  }

  const OmpJob& job_;
  const float* gram_ = nullptr;   // (n, n)
  const char* column_ = nullptr;  // of its first row, this thread's atoms
  int first_;                     // of this thread's atoms
  SharedAddress shared_;          // of OmpQuadShared
  SharedAddress chosen_ = 0;      // of a slot
  float least_ = 1.0f;  // share of an atom taken that was not in the span of those before it
  int quads_ = 0;       // whole ones
  int found_ = 0;
  int asked_ = -1;             // the atom that chosen_ is about, if any
  unsigned parity_ = 0;        // of the slots that are written next
  float weight_[kAtoms];       // as in OmpQuadSlot
  float pivot_[kAtoms];        // as in OmpQuadSlot
  float correlation_[kAtoms];  // <a, r>
  float open_[4][kAtoms];      // D: the rows since the last whole quad
  float closed_[kQuads][4][kAtoms];
};

// A thread has 65,536 registers over the threads of the largest block: cpp/omp.cc counts on that.
__global__ void __launch_bounds__(kOmpQuadThreadsMax, 1) omp_quad_kernel(const OmpJob job) {
  OnQuads engine(job);
  const int batch = static_cast<int>(job.asked.batch);
  for (int b = static_cast<int>(blockIdx.x); b < batch; b += static_cast<int>(gridDim.x)) {
    const OmpStatus status = pursue_one_by_one(engine, job.asked, b);
    engine.write(job.asked, b, status);
  }
}

}  // namespace csfast::cuda
