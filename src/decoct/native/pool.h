// Threads that share out blocks of rows among themselves: each begins with a stretch of its own, so that what it reads next lies behind
// what it reads now, and takes from the end of another's when it is done. They wait actively for a moment, since the next product of a
// model usually follows at once, then sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>

namespace decoct {

class Pool {
 public:
  // Calls work(first, last) with ranges that together cover [0, count), on as many threads. Where the pool is busy with
  // another caller's work, the calling thread does its own alone.
  void share(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& work);

  // The process's pool; a forked child, which has none of its parent's threads, gets another.
  static Pool& shared();

 private:
  static constexpr int kMostHelpers = 255;

  void run(int number);
  bool work_on(int part, bool from_behind);
  void serve(int number);
  void start(int helpers);

  std::mutex owner_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> turn_{0};  // number of the turn << 16 | helpers that take part
  std::atomic<int> working_{0};
  struct alignas(64) Left {
    std::atomic<uint64_t> pieces{0};
  };
  Left left_[kMostHelpers + 1];  // of each thread's stretch; the calling thread is the last
  const std::function<void(int64_t, int64_t)>* work_ = nullptr;
  int64_t count_ = 0, grain_ = 1;
  int parts_ = 1, helpers_ = 0;
};

}  // namespace decoct
