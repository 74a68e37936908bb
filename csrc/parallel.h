// Sharing the work of a call over XLA's threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace qvla {

// How far the threads of a call have come with its items.
struct Progress {
  explicit Progress(int64_t items) : count(items) {}

  // Does items that no thread has taken until none is left.
  template <class F>
  void take(const F& f) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) {
      f(i);
      done.fetch_add(1, std::memory_order_release);
    }
  }

  // Until what other threads have taken is done.
  void wait() const {
    while (done.load(std::memory_order_acquire) < count) std::this_thread::yield();
  }

  const int64_t count;
  std::atomic<int64_t> next{0}, done{0};
};

// Runs first(0) ... first(m - 1) and, when these are done, second(0) ... second(n - 1), on this thread
// and on XLA's, which are woken once for both. This thread works too and waits only for items that a
// running thread has taken, so a pool whose threads all sit here goes on.
template <class F, class G>
void parallel(ffi::ThreadPool& pool, int64_t threads, int64_t m, const F& first, int64_t n,
              const G& second) {
  if (threads <= 1 || n <= 1) {
    for (int64_t i = 0; i < m; ++i) first(i);
    for (int64_t i = 0; i < n; ++i) second(i);
    return;
  }
  struct State {
    State(int64_t m, int64_t n) : first(m), second(n) {}
    Progress first, second;
  };
  const auto state = std::make_shared<State>(m, n);
  // A task that starts late finds no item left and touches neither function: both are gone by then.
  auto work = [state, f = &first, g = &second] {
    state->first.take(*f);
    state->first.wait();
    state->second.take(*g);
  };
  for (int64_t t = 1; t < std::min(threads, n); ++t) {
    auto copy = work;
    pool.Schedule(std::move(copy));  // takes rvalues alone
  }
  work();
  state->second.wait();
}

}  // namespace qvla
