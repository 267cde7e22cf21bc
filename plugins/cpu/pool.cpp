// SPDX-License-Identifier: MIT
//
// Threads for callers that have none of their own, PyTorch and the tests.
#include <fastmqa/attention_cpu.h>
#include <hwy/cache_control.h>

#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

namespace {

using Task = void (*)(void* context, int32_t i);

// Returns when `x` is no longer `old`. Calls follow each other closely while a model runs, and
// waking a thread takes about as long as a small call: so it looks for a while before it sleeps.
template <typename T>
void wait_while(const std::atomic<T>& x, T old) {
  constexpr int kLooks = 2000;
  for (int i = 0; i < kLooks; ++i) {
    if (x.load(std::memory_order_acquire) != old) return;
    hwy::Pause();
  }
  x.wait(old);
}

class Pool {
 public:
  // The caller's thread is one of them, so one less is started.
  explicit Pool(int32_t threads) {
    workers_.reserve(static_cast<size_t>(threads - 1));
    try {
      for (int32_t i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
    } catch (...) {
      stop();
      throw;
    }
  }
  ~Pool() { stop(); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // A second caller meanwhile does its work alone.
  void parallel_for(int32_t count, Task task, void* context) {
    const std::unique_lock<std::mutex> lock(is_in_use_, std::try_to_lock);
    if (!lock.owns_lock()) {
      for (int32_t i = 0; i < count; ++i) task(context, i);
      return;
    }
    task_ = task;
    context_ = context;
    count_ = count;
    next_ = 0;
    busy_ = static_cast<int32_t>(workers_.size());
    ++round_;
    round_.notify_all();
    take_items();
    for (int32_t busy; (busy = busy_) != 0;) wait_while(busy_, busy);
  }

 private:
  void work() {
    for (uint32_t seen = 0;;) {
      wait_while(round_, seen);
      ++seen;
      if (is_stopping_) return;
      take_items();
      if (--busy_ == 0) busy_.notify_one();
    }
  }
  void take_items() {
    for (int32_t i; (i = next_++) < count_;) task_(context_, i);
  }
  void stop() {
    is_stopping_ = true;
    ++round_;
    round_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  std::mutex is_in_use_;
  std::vector<std::thread> workers_;
  std::atomic<uint32_t> round_ = 0;  // counts calls of parallel_for
  std::atomic<int32_t> busy_ = 0;    // workers that have not finished this one
  std::atomic<int32_t> next_ = 0;
  std::atomic<bool> is_stopping_ = false;
  int32_t count_ = 0;
  Task task_ = nullptr;
  void* context_ = nullptr;
};

}  // namespace

void fastmqa_cpu_create_pool(int32_t threads, fastmqa::cpu::ThreadPool* pool) {
  *pool = {};
  if (threads < 1) return;
  try {
    pool->pool = new Pool(threads);
  } catch (...) {
    return;
  }
  pool->threads = threads;
  pool->parallel_for = [](void* self, int32_t count, Task task, void* context) {
    static_cast<Pool*>(self)->parallel_for(count, task, context);
  };
}

void fastmqa_cpu_destroy_pool(const fastmqa::cpu::ThreadPool* pool) {
  delete static_cast<Pool*>(pool->pool);
}
