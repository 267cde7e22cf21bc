// SPDX-License-Identifier: MIT
//
// Threads for callers that have none of their own, PyTorch and the tests.
#include <fastmqa/attention_cpu.h>
#include <hwy/cache_control.h>

#include <atomic>
#include <bit>
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

// Whoever is awake takes items, and the caller waits for items, not for threads: one that another
// program keeps from waking in time is not missed.
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
    done_ = 0;
    offer(count);
    take_items();
    for (int32_t done; (done = done_) != count;) wait_while(done_, done);
  }

 private:
  // What there is to do, in one word, so that an item is taken from the call that offered it or not
  // at all.
  struct Offer {
    uint32_t call;  // number
    int32_t left;   // items that nobody took yet; kEnd: there will be none
  };
  static_assert(sizeof(Offer) == sizeof(uint64_t));
  static constexpr int32_t kEnd = -1;

  void offer(int32_t count) {
    const uint32_t call = std::bit_cast<Offer>(offer_.load()).call + 1;
    offer_ = std::bit_cast<uint64_t>(Offer{call, count});
    offer_.notify_all();
  }
  void take_items() {
    for (uint64_t seen = offer_; std::bit_cast<Offer>(seen).left > 0;) {
      Offer taken = std::bit_cast<Offer>(seen);
      --taken.left;
      if (!offer_.compare_exchange_weak(seen, std::bit_cast<uint64_t>(taken))) continue;
      // These cannot change before the item is done, and its call with it.
      task_(context_, taken.left);
      done_.fetch_add(1);
      done_.notify_one();
      seen = offer_;
    }
  }
  void work() {
    for (;;) {
      take_items();
      const uint64_t seen = offer_;
      const int32_t left = std::bit_cast<Offer>(seen).left;
      if (left == kEnd) return;
      if (left == 0) wait_while(offer_, seen);
    }
  }
  void stop() {
    offer(kEnd);
    for (std::thread& worker : workers_) worker.join();
  }

  std::mutex is_in_use_;
  std::vector<std::thread> workers_;
  std::atomic<uint64_t> offer_ = 0;
  std::atomic<int32_t> done_ = 0;  // items of this call
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
