// Threads that share the work on a large tensor: TensorFlow's C interface does not lend its own.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// One call at a time has the threads; others meanwhile work alone.
class Threads {
 public:
  static Threads& shared() {
    // Never destroyed: they may be waiting when the process ends.
    static Threads* threads = new Threads;
    return *threads;
  }

  // How many work together, whoever asks for it among them. Those that run already stay.
  void limit(int count) {
    std::lock_guard<std::mutex> lock(mutex_);
    limit_ = count;
  }

  // Calls `work(i)` once for each i from 0 to `parts`, in any order. Nobody is waited for who has not begun a part.
  // `work` must not throw.
  template <class Work>
  void parallel_for(int64_t parts, const Work& work) {
    std::unique_lock<std::mutex> alone(busy_, std::defer_lock);
    if (parts < 2 || !alone.try_lock()) {
      for (int64_t i = 0; i < parts; ++i) work(i);
      return;
    }
    const Job job{[](const void* work, int64_t i) { (*static_cast<const Work*>(work))(i); }, &work, parts, modes()};
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start();
      next_ = 0;
      job_ = &job;
    }
    begun_.notify_all();
    take_parts(job);
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    left_.wait(lock, [this] { return inside_ == 0; });
  }

 private:
  struct Job {
    void (*call)(const void* work, int64_t i);
    const void* work;
    int64_t parts;
    unsigned modes;
  };

  void start() {
    try {
      for (; started_ + 1 < limit_; ++started_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // The system gives no more of them: those there are do the work.
      limit_ = started_ + 1;
    }
  }

  void take_parts(const Job& job) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < job.parts;) job.call(job.work, i);
  }

  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      begun_.wait(lock, [this] { return job_ != nullptr && next_ < job_->parts; });
      const Job& job = *job_;
      ++inside_;
      lock.unlock();
      set_modes(job.modes);
      take_parts(job);
      lock.lock();
      if (--inside_ == 0) left_.notify_one();
    }
  }

  // How the processor rounds, and whether it flushes subnormal numbers, as on the thread that asks.
#if defined(__x86_64__)
  static unsigned modes() { return _mm_getcsr(); }
  static void set_modes(unsigned modes) { _mm_setcsr(modes); }
#else
  static unsigned modes() { return 0; }
  static void set_modes(unsigned) {}
#endif

  std::mutex busy_, mutex_;
  std::condition_variable begun_, left_;
  std::atomic<int64_t> next_{0};
  const Job* job_ = nullptr;
  int limit_ = 1, started_ = 0, inside_ = 0;
};

}  // namespace
