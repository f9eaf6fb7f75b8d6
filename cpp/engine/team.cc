#include "engine/team.h"

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace csfast {
namespace {

constexpr int kBits = 20;
constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;
// Parts for each thread. One would make all wait for whoever begins late; each more costs a line
// that goes from core to core: with eight a draft of SmolLM2 on two cores takes a third longer.
constexpr int64_t kPartsEach = 2;
// Looks before sleeping, some 20 us: longer than what stands between two loops of a step.
constexpr int kLooks = 1000;

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#endif
}

}  // namespace

Team::Team(int n_threads) {
  try {
    for (int i = 1; i < n_threads; ++i) others_.emplace_back([this] { help(); });
  } catch (const std::system_error&) {
    const auto found = std::to_string(others_.size() + 1);
    end();  // or those that there are would end the process
    throw std::runtime_error("[engine] threads = " + std::to_string(n_threads) + ": " + found +
                             " were to be had; want no more.");
  }
}

Team::~Team() {
  end();
}

void Team::end() {
  ends_.store(true);
  number_.fetch_add(1);
  wake();
  for (std::thread& other : others_) other.join();
}

void Team::share(int64_t n, Call call, const void* f) {
  grain_ = std::max<int64_t>(1, n / (kPartsEach * n_threads()));
  const int64_t parts = (n + grain_ - 1) / grain_;
  call_ = call;
  f_ = f;
  n_ = n;
  left_.store(static_cast<int32_t>(parts), std::memory_order_relaxed);
  const uint32_t number = number_.load(std::memory_order_relaxed) + 1;
  ticket_.store(uint64_t{number} << (2 * kBits) | static_cast<uint64_t>(parts) << kBits,
                std::memory_order_release);
  number_.store(number);
  wake();
  while (take()) {
  }
  wait_until([this] { return left_.load() == 0; });
}

// Not std::atomic::wait: before it sleeps it gives up its turn several times, which on a loaded
// machine costs a whole turn of somebody else each time.
template <typename F>
void Team::wait_until(const F& is_so) {
  for (int i = 0; i < kLooks; ++i) {
    if (is_so()) return;
    pause();
  }
  std::unique_lock lock(mutex_);
  ++sleepers_;  // before the last look, as who changes something looks for sleepers after that
  changed_.wait(lock, is_so);
  --sleepers_;
}

void Team::wake() {
  if (sleepers_.load() == 0) return;
  {
    const std::lock_guard lock(mutex_);
  }  // nobody is between the last look and sleep
  changed_.notify_all();
}

// Does one part, if one is left.
bool Team::take() {
  const uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
  const int64_t part = static_cast<int64_t>(ticket & kMask);
  if (part >= static_cast<int64_t>(ticket >> kBits & kMask)) return false;
  const int64_t first = part * grain_;
  call_(f_, first, std::min(n_, first + grain_));
  if (left_.fetch_sub(1) == 1) wake();
  return true;
}

void Team::help() {
  for (;;) {
    const uint32_t number = number_.load(std::memory_order_acquire);
    while (take()) {
    }
    if (ends_.load()) return;
    wait_until([this, number] { return number_.load() != number; });
  }
}

}  // namespace csfast
