// Threads that share out blocks of rows among themselves. They wait actively for a moment, since the next product of a
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
  void run();
  void serve(int number);
  void start(int helpers);

  std::mutex owner_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> turn_{0};  // number of the turn << 16 | helpers that take part
  std::atomic<int> working_{0};
  std::atomic<int64_t> next_{0};
  const std::function<void(int64_t, int64_t)>* work_ = nullptr;
  int64_t count_ = 0, grain_ = 1;
  int helpers_ = 0;
};

}  // namespace decoct
