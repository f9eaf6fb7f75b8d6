// Omp on the chip: one block a problem, the whole pursuit without a word to memory but one row of
// gram an atom.
//
// Kept are the directions q_t of the atoms taken, as rows D_t[j] = <q_t, a_j> (eq. 16): the first
// kHeld in registers, the next in shared memory, and those for which there is no room in the
// workspace, which the L2 cache holds. A new row costs one multiplication and addition for every
// row before it and every atom, budget^2 / 2 * n_atoms in all; shared memory has to deliver 4 bytes
// for each of them that is not in a register. Beside that every warp runs some 250 instructions an
// atom taken, with one barrier among them: that is what bounds it, so a thread has as many atoms as
// its registers hold.
#pragma once

#include "common/shared.cuh"
#include "common/warp.cuh"
#include "common/workspace.h"
#include "omp/index.cuh"
#include "omp/rules.cuh"

namespace csfast::cuda {

// What a warp says of one atom: its best one, or the one that was asked for.
template <int kHeld>
struct alignas(16) OmpSlot {
  unsigned score;  // bits; in load(): of the largest correlation
  int atom;        // or group
  int padding[2];
  float correlation;  // <a, r>
  float pivot;        // |a|^2 less what the span of the atoms taken has of it
  float weight;       // 1 / |a|, 0 for what may not be taken
  float padding_too;
  float held[kHeld > 0 ? kHeld : 4];  // D_t[atom] of the rows in registers
};
static_assert(sizeof(OmpSlot<0>) == OmpChipLayout::slot_bytes(0));
static_assert(sizeof(OmpSlot<kOmpHeldFlat>) == OmpChipLayout::slot_bytes(kOmpHeldFlat));
static_assert(sizeof(OmpSlot<kOmpHeldDeep>) == OmpChipLayout::slot_bytes(kOmpHeldDeep));

// A thread has kAtoms atoms: four neighbours of every `4 * threads`, one 16-byte load each.
template <int kAtoms, int kHeld, bool kOne, bool kSpills>
class OnChip {
 public:
  static constexpr bool kSingle = kOne;

  __device__ explicit OnChip(const OmpJob& job) : job_(job) {}

  float energy = 0.0f, left = 0.0f, gained = 0.0f;
  int exponent = 0, count = 0;

  __device__ __forceinline__ bool load(const OmpParams& p, int b) {
    const float signal = p.energy[b];
    const int dictionary = p.dictionary == nullptr ? 0 : p.dictionary[b];
    count = 0;
    asked_ = -1;
    if (dictionary < 0 || dictionary >= p.n_dictionaries) return false;
    const float* gram = p.gram + int64_t{dictionary} * n() * n();
    if (gram != gram_) {
      gram_ = gram;
      float square[kAtoms];
#pragma unroll
      for (int e = 0; e < kAtoms; ++e) {
        const int64_t j = atom_at(e);
        square[e] = j < n() ? __ldg(gram + j * n() + j) : 0.0f;
      }
      store_atoms(squares(), square);
    }
    load_atoms(p.correlation + int64_t{b} * n(), correlation_);
    unsigned peak = 0;
    unsigned worst = isfinite(signal) && signal >= 0.0f ? 0 : kInfinity;
#pragma unroll
    for (int e = 0; e < kAtoms; ++e) {
      pivot_[e] = squares()[atom_at(e)];
      weight_[e] = weight_of(pivot_[e]);
      peak = max(peak, magnitude(correlation_[e]));
      worst = max(worst, max(magnitude(weight_[e]), magnitude(pivot_[e])));
#pragma unroll
      for (int t = 0; t < kHeld; ++t) held_[t][e] = 0.0f;
    }
    peak = choose(worst >= kInfinity ? kInfinity : peak, static_cast<int>(threadIdx.x), -1);
    if (peak >= kInfinity) return false;

    exponent = peak > 0 ? exponent_of(peak) : 0;
    if (threadIdx.x == 0)
      *exponents() = exponent;  // write() takes it from there: one register less
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
    asked_ = -1;  // what the slot says holds until an atom is taken
    // The row of gram is under way while everything else goes on.
    float row[kAtoms];
    load_atoms(gram_ + uint64_t{static_cast<unsigned>(atom)} * static_cast<unsigned>(n()), row);
    const Slot& slot = *chosen_;
    const float4 known = *reinterpret_cast<const float4*>(&slot.correlation);
    const float correlation = known.x, pivot = known.y, weight = known.z;
    if (weight == 0.0f) return Taken::kPassedOver;
    if (!isfinite(pivot) || !isfinite(correlation)) return Taken::kNotFinite;
    const int own = own_index(atom);
    if (own >= 0) at_index<0, kAtoms>(own, [&]<int e>() { weight_[e] = 0.0f; });
    const float share = pivot * weight * weight;
    if (!(share * least_ > static_cast<float>(kPivot))) return Taken::kPassedOver;
    least_ = fminf(least_, share);

    const float scale = __frsqrt_rn(pivot);
    const float along = correlation * scale;
    float sum[kAtoms] = {};
#pragma unroll
    for (int t = 0; t < kHeld; t += 4) {
      if (t < count) {
        const float4 w = *reinterpret_cast<const float4*>(slot.held + t);
#pragma unroll
        for (int e = 0; e < kAtoms; ++e) {
          sum[e] = __fmaf_rn(w.x, held_[t][e], sum[e]);
          sum[e] = __fmaf_rn(w.y, held_[t + 1][e], sum[e]);
          sum[e] = __fmaf_rn(w.z, held_[t + 2][e], sum[e]);
          sum[e] = __fmaf_rn(w.w, held_[t + 3][e], sum[e]);
        }
      }
    }
    const int in_shared = min(max(count - kHeld, 0), rows_shared());
#pragma unroll 4
    for (int t = 0; t < in_shared; ++t) add(row_of_shared(t)[atom], row_of_shared(t), sum);
    if constexpr (kSpills) add_memory(atom, max(count - kHeld - rows_shared(), 0), sum);
    if (factored()) keep_column(slot, atom);

    float d[kAtoms];
#pragma unroll
    for (int e = 0; e < kAtoms; ++e) {
      d[e] = (row[e] - sum[e]) * scale;
      correlation_[e] = __fmaf_rn(-along, d[e], correlation_[e]);
      pivot_[e] = __fmaf_rn(-d[e], d[e], pivot_[e]);
    }
    keep_row(d);
    if (threadIdx.x == 0) {
      alongs()[count] = along;
      scales()[count] = scale;
      indices()[count] = atom;
    }
    left = fmaxf(__fmaf_rn(-along, along, left), 0.0f);
    gained = __fmaf_rn(along, along, kSingle ? 0.0f : gained);
    ++count;
    return Taken::kTaken;
  }

  __device__ __forceinline__ unsigned best() {
    float score[kAtoms];
#pragma unroll
    for (int e = 0; e < kAtoms; ++e) score[e] = __fmul_rn(correlation_[e], weight_[e]);
    if constexpr (kSingle) {
      unsigned top = magnitude(score[0]);
      int own = 0;
#pragma unroll
      for (int e = 1; e < kAtoms; ++e) {
        if (magnitude(score[e]) > top) {
          top = magnitude(score[e]);
          own = e;
        }
      }
      return choose(top, atom_at(own), own);
    }
    // Behind the barrier of the last choose() nobody reads scores any more.
    store_atoms(scores(), score);
    __syncthreads();
    // A group's score takes the place of its first atom's, which only its own thread looks at.
    if (group() > 1) {
      for (int g = static_cast<int>(threadIdx.x); g < n() / group(); g += threads()) {
        float sum = 0.0f;
        for (int j = g * group(); j < (g + 1) * group(); ++j) {
          sum = __fmaf_rn(scores()[j], scores()[j], sum);
        }
        scores()[g * group()] = sum;
      }
    }
    return choose_group();
  }

  __device__ __forceinline__ int pick(int most, float limit, unsigned best) {
    if constexpr (kSingle) return 1;
    int picked = 0;
    while (__uint_as_float(best) > limit) {
      const int g = found_;
      if (threadIdx.x == 0) picks()[picked] = g;
      if (++picked == most || picked == n() / group()) break;
      if (g % threads() == static_cast<int>(threadIdx.x)) scores()[g * group()] = 0.0f;
      best = choose_group();
    }
    __syncthreads();  // orders picks
    return picked;
  }

  __device__ __forceinline__ int picked(int i) const { return kSingle ? found_ : picks()[i]; }

  // The first warp writes the problem out: x = R^-1 z, from the last coefficient to the first.
  __device__ __forceinline__ void write(const OmpParams& p, int b, OmpStatus status) {
    if (factored()) __syncthreads();  // orders R, of which every warp has written a part
    if (threadIdx.x >= kWarp) return;
    const int lane = static_cast<int>(threadIdx.x);
    const int width = static_cast<int>(p.budget_max);
    const int kept = status == OmpStatus::kNotFinite ? 0 : count;
    __syncwarp();  // orders alongs, scales, indices and exponents
    const double unit = power_of_two(status == OmpStatus::kNotFinite ? 0 : *exponents());
    int32_t* index = p.index + int64_t{b} * width;
    for (int i = lane; i < width; i += kWarp) index[i] = i < kept ? indices()[i] : 0;
    if (lane == 0) write_end(p, b, status, kept, static_cast<float>(__fsqrt_rn(left) * unit));
    if (!factored()) return;

    for (int i = lane; i < kept; i += kWarp) solved()[i] = alongs()[i];
    __syncwarp();
    for (int t = kept - 1; t >= 0; --t) {
      const double x = solved()[t] * scales()[t];
      const float* column = column_of_factor(t);
      for (int i = lane; i < t; i += kWarp) solved()[i] -= column[i] * x;
      __syncwarp();
    }
    float* coef = p.coef + int64_t{b} * width;
    for (int i = lane; i < width; i += kWarp) {
      const double x = i < kept ? solved()[i] * scales()[i] : 0.0;
      coef[i] = static_cast<float>(x * unit);
    }
  }

 private:
  using Slot = OmpSlot<kHeld>;
  static_assert(kAtoms % 4 == 0 && kHeld % 4 == 0);

  __device__ int n() const { return static_cast<int>(job_.asked.n_atoms); }
  __device__ int group() const { return static_cast<int>(job_.asked.group); }
  __device__ int threads() const { return job_.plan.threads; }
  __device__ int warps() const {
    return static_cast<int>(static_cast<unsigned>(job_.plan.threads) / kWarp);
  }
  __device__ int pitch() const { return job_.plan.threads * kAtoms; }
  __device__ int rows_shared() const { return job_.plan.rows_shared; }
  __device__ bool factored() const { return job_.asked.coef != nullptr; }

  // This thread's e-th atom; they ascend with e.
  __device__ __forceinline__ int atom_at(unsigned e) const {
    return static_cast<int>(e / 4 * 4 * job_.plan.threads + threadIdx.x * 4 + e % 4);
  }
  // The e of an atom that is this thread's, or -1.
  __device__ __forceinline__ int own_index(int atom) const {
#pragma unroll
    for (int e = 0; e < kAtoms; e += 4) {
      const int past = atom - atom_at(e);
      if (past >= 0 && past < 4) return e + past;
    }
    return -1;
  }

  // The warp that has an atom.
  __device__ __forceinline__ int warp_of(int atom) const {
#pragma unroll
    for (int e = 4; e < kAtoms; e += 4) {
      if (atom >= 4 * threads()) atom -= 4 * threads();
    }
    return static_cast<int>(static_cast<unsigned>(atom) / (4 * kWarp));
  }

  template <typename T>
  __device__ static T* shared_at(int64_t offset) {
    return reinterpret_cast<T*>(dynamic_shared() + offset);
  }
  // The slots that are written next; (warps).
  __device__ Slot* slots() const { return shared_at<Slot>(job_.layout.slots) + parity_ * warps(); }
  __device__ float* squares() const { return shared_at<float>(job_.layout.square); }     // (pitch)
  __device__ float* scores() const { return shared_at<float>(job_.layout.score); }       // (pitch)
  __device__ double* solved() const { return shared_at<double>(job_.layout.solved); }    // (width)
  __device__ float* alongs() const { return shared_at<float>(job_.layout.along); }       // (width)
  __device__ float* scales() const { return shared_at<float>(job_.layout.scale); }       // (width)
  __device__ int32_t* indices() const { return shared_at<int32_t>(job_.layout.index); }  // (width)
  __device__ int32_t* picks() const { return shared_at<int32_t>(job_.layout.pick); }     // (width)
  __device__ int* exponents() const { return shared_at<int>(job_.layout.exponent); }     // (1)
  __device__ float* row_of_shared(int t) const {                                         // (pitch)
    return shared_at<float>(job_.layout.rows) + t * pitch();
  }
  __device__ float* row_of_memory(int t) const {  // (pitch)
    return in_workspace(job_.layout.spilled) + int64_t{t} * pitch();
  }
  __device__ float* column_of_factor(int t) const {  // (t)
    float* factor = job_.plan.factor_shared ? shared_at<float>(job_.layout.factor)
                                            : in_workspace(job_.layout.factor);
    return factor + int64_t{t} * (t - 1) / 2;
  }
  __device__ float* in_workspace(int64_t offset) const {
    return at<float>(job_.asked.workspace, blockIdx.x * job_.layout.workspace + offset);
  }

  // This thread's atoms of a row (n) of memory that nobody writes, zeros beyond the last.
  __device__ __forceinline__ void load_atoms(const float* row, float (&v)[kAtoms]) const {
#pragma unroll
    for (int e = 0; e < kAtoms; e += 4) {
      const int first = atom_at(e);
      const float* own = row + first;
      if (first + 4 <= n() && job_.aligned) {
        const float4 four = __ldg(reinterpret_cast<const float4*>(own));
        v[e] = four.x;
        v[e + 1] = four.y;
        v[e + 2] = four.z;
        v[e + 3] = four.w;
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[e + i] = first + i < n() ? __ldg(own + i) : 0.0f;
      }
    }
  }

  __device__ __forceinline__ void store_atoms(float* row, const float (&v)[kAtoms]) const {
#pragma unroll
    for (int e = 0; e < kAtoms; e += 4) {
      *reinterpret_cast<float4*>(row + atom_at(e)) = {v[e], v[e + 1], v[e + 2], v[e + 3]};
    }
  }

  __device__ __forceinline__ void add(float w, const float* row, float (&sum)[kAtoms]) const {
#pragma unroll
    for (int e = 0; e < kAtoms; e += 4) {
      const float4 d = *reinterpret_cast<const float4*>(row + atom_at(e));
      sum[e] = __fmaf_rn(w, d.x, sum[e]);
      sum[e + 1] = __fmaf_rn(w, d.y, sum[e + 1]);
      sum[e + 2] = __fmaf_rn(w, d.z, sum[e + 2]);
      sum[e + 3] = __fmaf_rn(w, d.w, sum[e + 3]);
    }
  }

  // The rows that have been spilled: a lane fetches the atom's entry of one for the whole warp.
  __device__ __forceinline__ void add_memory(int atom, int rows, float (&sum)[kAtoms]) const {
    constexpr int kAhead = kHeld > 0 ? 2 : 4;  // rows on their way: as registers are left
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    for (int from = 0; from < rows; from += kWarp) {
      const float own = from + lane < rows ? row_of_memory(from + lane)[atom] : 0.0f;
      const float* row = row_of_memory(from);
      const int these = min(kWarp, rows - from);
#pragma unroll kAhead
      for (int t = 0; t < these; ++t, row += pitch()) add(__shfl_sync(kFull, own, t), row, sum);
    }
  }

  // The next row of D.
  __device__ __forceinline__ void keep_row(const float (&d)[kAtoms]) {
    const int t = count - kHeld;
    if (t < 0) {
      at_index<0, kHeld>(count, [&]<int i>() {
#pragma unroll
        for (int e = 0; e < kAtoms; ++e) held_[i][e] = d[e];
      });
    } else {
      store_atoms(
          kSpills && t >= rows_shared() ? row_of_memory(t - rows_shared()) : row_of_shared(t), d);
    }
  }

  // The next column of R: the new atom's entries of the rows of D.
  __device__ __forceinline__ void keep_column(const Slot& slot, int atom) const {
    float* column = column_of_factor(count);
    for (int t = static_cast<int>(threadIdx.x); t < count; t += threads()) {
      float entry;
      if (t < kHeld) {
        entry = slot.held[t];
      } else if (!kSpills || t < kHeld + rows_shared()) {
        entry = row_of_shared(t - kHeld)[atom];
      } else {
        entry = row_of_memory(t - kHeld - rows_shared())[atom];
      }
      column[t] = entry;
    }
  }

  // Says what is known of this thread's atom of index `own`.
  __device__ __forceinline__ void publish(Slot& slot, int own) const {
    at_index<0, kAtoms>(own, [&]<int e>() {
      *reinterpret_cast<float4*>(&slot.correlation) = {correlation_[e], pivot_[e], weight_[e],
                                                       0.0f};
#pragma unroll
      for (int t = 0; t < kHeld; t += 4) {
        *reinterpret_cast<float4*>(slot.held + t) = {held_[t][e], held_[t + 1][e], held_[t + 2][e],
                                                     held_[t + 3][e]};
      }
    });
  }

  // Finds the best of all threads' scores, ties to the lower atom or group, which is then found_.
  // Of an atom, `own` is its index, and chosen_ is a slot that says what is known of it.
  __device__ __forceinline__ unsigned choose(unsigned score, int atom, int own) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const unsigned top = __reduce_max_sync(kFull, score);
    const int lowest = __reduce_min_sync(kFull, score == top ? atom : INT32_MAX);
    Slot* slots = this->slots();
    if (score == top && atom == lowest) {
      slots[warp].score = score;
      slots[warp].atom = atom;
      if (own >= 0) publish(slots[warp], own);
    }
    __syncthreads();  // these slots were read last before the barrier of the last choose() or ask()
    const bool listens = lane < warps();
    const unsigned said = listens ? slots[lane].score : 0;
    const int about = listens ? slots[lane].atom : INT32_MAX;
    const unsigned best = __reduce_max_sync(kFull, said);
    found_ = __reduce_min_sync(kFull, said == best ? about : INT32_MAX);
    if (own >= 0) {
      chosen_ = slots + warp_of(found_);
      asked_ = found_;
    }
    parity_ ^= 1;
    return best;
  }

  // The same over the groups, by what scores say.
  __device__ __forceinline__ unsigned choose_group() {
    unsigned top = 0;
    int found = static_cast<int>(threadIdx.x);
    for (int g = found; g < n() / group(); g += threads()) {
      const unsigned score = magnitude(scores()[g * group()]);
      if (score <= top) continue;
      top = score;
      found = g;
    }
    return choose(top, found, -1);
  }

  // Lets the thread that has an atom say what is known of it.
  __device__ __forceinline__ void ask(int atom) {
    Slot* slots = this->slots();
    const int own = own_index(atom);
    if (own >= 0) publish(slots[0], own);
    __syncthreads();  // as in choose()
    chosen_ = slots;
    asked_ = atom;
    parity_ ^= 1;
  }

  const OmpJob& job_;
  const float* gram_ = nullptr;  // (n, n)
  const Slot* chosen_ = nullptr;
  float least_ = 1.0f;  // share of an atom taken that was not in the span of those before it
  int found_ = 0;
  int asked_ = -1;                             // the atom that chosen_ is about, if any
  int parity_ = 0;                             // of the slots that are written next
  float weight_[kAtoms];                       // as in OmpSlot
  float pivot_[kAtoms];                        // as in OmpSlot
  float correlation_[kAtoms];                  // <a, r>
  float held_[kHeld > 0 ? kHeld : 1][kAtoms];  // D
};

template <int kAtoms, int kHeld, bool kOne, bool kSpills>
__device__ __forceinline__ void pursue_on_chip(const OmpJob& job) {
  OnChip<kAtoms, kHeld, kOne, kSpills> engine(job);
  const int batch = static_cast<int>(job.asked.batch);
  for (int b = static_cast<int>(blockIdx.x); b < batch; b += static_cast<int>(gridDim.x)) {
    const OmpStatus status = pursue(engine, job.asked, b);
    engine.write(job.asked, b, status);
  }
}

// A thread has 65,536 registers over the threads of the largest block: cpp/omp.cc counts on that.
template <bool kOne, bool kSpills>
__global__ void __launch_bounds__(256, 1) omp_deep_kernel(const OmpJob job) {
  pursue_on_chip<8, kOmpHeldDeep, kOne, kSpills>(job);
}

template <bool kOne>
__global__ void __launch_bounds__(512, 1) omp_flat_kernel(const OmpJob job) {
  pursue_on_chip<4, kOmpHeldFlat, kOne, false>(job);
}

template <bool kOne, bool kSpills>
__global__ void __launch_bounds__(512, 1) omp_wide_kernel(const OmpJob job) {
  pursue_on_chip<8, 0, kOne, kSpills>(job);
}

}  // namespace csfast::cuda
