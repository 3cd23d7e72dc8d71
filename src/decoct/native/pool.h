// Threads that share out blocks of rows among themselves: each begins with a stretch of its own, so that what it reads next lies behind
// what it reads now, and takes from the end of another's when it is done. The threads are torch's, where they can be borrowed: two sets
// of threads, of which each waits actively for its next work, take the processor's cores from one another. Otherwise they are the pool's
// own, which wait actively for a moment, since the next product of a model usually follows at once, then sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>

namespace decoct {

// One call's work and what is left of it. Work does not share again.
class Share {
 public:
  static constexpr int kMostParts = 256;

  // Calls work(first, last) with ranges of about `grain` that together cover [0, count); `parts` threads may take part.
  Share(int64_t count, int64_t grain, int parts, const std::function<void(int64_t, int64_t)>& work);

  // What thread `number` does; returns when nothing is left that no thread has begun. One thread alone does everything.
  void run(int number);
  // The same for a thread that has no number yet.
  void join() { run(joined_.fetch_add(1, std::memory_order_relaxed)); }

 private:
  bool work_on(int part, bool from_behind);

  struct alignas(64) Left {
    std::atomic<uint64_t> pieces;
  };
  static Left* room();  // of the calling thread, which waits until the work is done

  const std::function<void(int64_t, int64_t)>& work_;
  const int64_t count_, grain_;
  const int parts_;
  Left* const left_;  // of each thread's stretch
  std::atomic<int> joined_{0};
};

class Pool {
 public:
  // As GNU's OpenMP starts its threads: each of them, the calling one too, calls work(data).
  typedef void (*Launch)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

  // Calls work(first, last) with ranges that together cover [0, count), on as many threads. Where the pool's own threads are busy with
  // another caller's work, the calling thread does its own alone.
  void share(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& work);

  // Borrow threads from now on; null: use the pool's own.
  void borrow(Launch launch) { launch_.store(launch); }

  // The process's pool; a forked child, which has none of its parent's threads, gets another, and borrows none.
  static Pool& shared();

 private:
  void serve(int number);
  void start(int helpers);
  void share_own(Share& share, int helpers);

  std::atomic<Launch> launch_{nullptr};
  std::mutex owner_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> turn_{0};  // number of the turn << 16 | helpers that take part
  std::atomic<int> working_{0};
  Share* share_ = nullptr;
  int helpers_ = 0;
};

}  // namespace decoct
