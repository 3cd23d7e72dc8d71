#include "pool.h"

#include <algorithm>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace decoct {
namespace {

constexpr int kSpins = 4000;      // of a helper before it sleeps: some tens of microseconds

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Pieces [first, last) as one number, so that both ends change at once.
uint64_t packed(uint64_t first, uint64_t last) { return first << 32 | last; }
uint64_t first_of(uint64_t pieces) { return pieces >> 32; }
uint64_t last_of(uint64_t pieces) { return pieces & 0xffffffffu; }

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

Share::Left* Share::room() {
  static thread_local Left left[kMostParts];
  return left;
}

Share::Share(int64_t count, int64_t grain, int parts, const std::function<void(int64_t, int64_t)>& work)
    : work_(work), count_(count), grain_(grain), parts_(parts), left_(room()) {
  const uint64_t pieces = (uint64_t)((count + grain - 1) / grain);
  for (int p = 0; p < parts; ++p) left_[p].pieces.store(packed(pieces * p / parts, pieces * (p + 1) / parts), std::memory_order_relaxed);
}

void Share::run(int number) {
  while (work_on(number, false)) continue;
  for (int p = 0; p < parts_; ++p)
    while (p != number && work_on(p, true)) continue;
}

bool Share::work_on(int part, bool from_behind) {
  std::atomic<uint64_t>& left = left_[part].pieces;
  uint64_t before = left.load(std::memory_order_relaxed), after;
  do {
    if (first_of(before) == last_of(before)) return false;
    after = from_behind ? before - 1 : before + (1ull << 32);
  } while (!left.compare_exchange_weak(before, after, std::memory_order_relaxed));
  const int64_t first = (int64_t)(from_behind ? last_of(after) : first_of(before)) * grain_;
  work_(first, std::min(first + grain_, count_));
  return true;
}

void Pool::share(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& work) {
  const int parts = (int)std::min<int64_t>({threads, (count - 1) / grain + 1, Share::kMostParts});
  if (parts <= 1) return work(0, count);
  if (const Launch launch = launch_.load(std::memory_order_relaxed)) {
    Share share(count, grain, parts, work);
    return launch([](void* data) { ((Share*)data)->join(); }, &share, (unsigned)parts, 0);
  }
  std::unique_lock<std::mutex> owned(owner_, std::defer_lock);
  if (!owned.try_lock()) return work(0, count);
  Share share(count, grain, parts, work);
  share_own(share, parts - 1);
}

void Pool::share_own(Share& share, int helpers) {
  start(helpers);
  share_ = &share;
  working_.store(helpers, std::memory_order_relaxed);
  {
    std::lock_guard<std::mutex> lock(sleep_);
    turn_.store(((turn_.load() >> 16) + 1) << 16 | (uint64_t)helpers, std::memory_order_release);
  }
  wake_.notify_all();
  share.run(helpers);
  for (int spins = 0; working_.load(std::memory_order_acquire); ++spins)
    spins < kSpins ? pause() : std::this_thread::yield();
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
    share_->run(number);
    working_.fetch_sub(1, std::memory_order_release);
  }
}

void Pool::start(int helpers) {
  for (; helpers_ < helpers; ++helpers_) std::thread([this, number = helpers_] { serve(number); }).detach();
}

}  // namespace decoct
