#include "pool.h"

#include <algorithm>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace decoct {
namespace {

constexpr int kSpins = 4000;      // of a helper before it sleeps: some tens of microseconds
constexpr int kMostHelpers = 255;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

Pool* pool = nullptr;
std::once_flag once;

void renew() { pool = new Pool; }  // never deleted: helpers may outlive everything else

}  // namespace

Pool& Pool::shared() {
  std::call_once(once, [] {
    renew();
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, renew);
#endif
  });
  return *pool;
}

void Pool::share(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& work) {
  const int helpers = (int)std::min<int64_t>({threads - 1, (count - 1) / grain, kMostHelpers});
  std::unique_lock<std::mutex> owned(owner_, std::defer_lock);
  if (helpers < 1 || !owned.try_lock()) return work(0, count);
  start(helpers);
  work_ = &work, count_ = count, grain_ = grain;
  next_.store(0, std::memory_order_relaxed);
  working_.store(helpers, std::memory_order_relaxed);
  {
    std::lock_guard<std::mutex> lock(sleep_);
    turn_.store(((turn_.load() >> 16) + 1) << 16 | (uint64_t)helpers, std::memory_order_release);
  }
  wake_.notify_all();
  run();
  for (int spins = 0; working_.load(std::memory_order_acquire); ++spins)
    spins < kSpins ? pause() : std::this_thread::yield();
}

void Pool::run() {
  for (;;) {
    const int64_t first = next_.fetch_add(grain_, std::memory_order_relaxed);
    if (first >= count_) return;
    (*work_)(first, std::min(first + grain_, count_));
  }
}

void Pool::serve(int number) {
  uint64_t seen = 0;
  for (;;) {
    uint64_t turn = turn_.load(std::memory_order_acquire);
    for (int spins = 0; turn == seen && spins < kSpins; ++spins) pause(), turn = turn_.load(std::memory_order_acquire);
    if (turn == seen) {
      std::unique_lock<std::mutex> lock(sleep_);
      wake_.wait(lock, [&] { return turn_.load() != seen; });
      turn = turn_.load();
    }
    seen = turn;
    if (number >= (int)(turn & 0xffff)) continue;
    run();
    working_.fetch_sub(1, std::memory_order_release);
  }
}

void Pool::start(int helpers) {
  for (; helpers_ < helpers; ++helpers_) std::thread([this, number = helpers_] { serve(number); }).detach();
}

}  // namespace decoct
