// The threads of an engine: they share loops out among themselves and wait without a fight.
//
// Who is free takes the next part, so a thread that the system has taken off its core holds up only
// what it had begun. Who finds nothing to do looks for some microseconds, then sleeps: on a loaded
// machine nobody spins for somebody who cannot run.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace csfast {

class Team {
 public:
  // With the caller of `run` among them.
  explicit Team(int n_threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int n_threads() const { return static_cast<int>(others_.size()) + 1; }

  // f(first, last) for neighbouring parts of [0, n), each once, by any thread. f must not throw.
  // One caller at a time.
  template <typename F>
  void run(int64_t n, const F& f) {
    if (n <= 1 || others_.empty()) {
      if (n > 0) f(int64_t{0}, n);
      return;
    }
    share(
        n,
        [](const void* of, int64_t first, int64_t last) {
          (*static_cast<const F*>(of))(first, last);
        },
        &f);
  }

 private:
  using Call = void (*)(const void*, int64_t, int64_t);

  void share(int64_t n, Call call, const void* f);
  bool take();
  void help();
  template <typename F>
  void wait_until(const F& is_so);
  void wake();
  void end();

  // What is shared out. Stays as it is until all parts are done.
  Call call_ = nullptr;
  const void* f_ = nullptr;
  int64_t n_ = 0;
  int64_t grain_ = 1;  // of a part

  // 24 bits that number the loop, 20 for its parts, 20 for those that have been taken: who takes
  // one learns from the old value alone whether there was one.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int32_t> left_{0};     // parts that are not done
  alignas(64) std::atomic<uint32_t> number_{0};  // of the loop: changes when there is work
  std::atomic<int> sleepers_{0};
  std::atomic<bool> ends_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::thread> others_;
};

}  // namespace csfast
