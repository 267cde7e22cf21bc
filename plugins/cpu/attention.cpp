// SPDX-License-Identifier: MIT
#include <fastmqa/attention_cpu.h>

#include <algorithm>
#include <atomic>

#include "check.h"
#include "kernels.h"
#include "plan.h"

namespace fastmqa::cpu {
namespace {

constexpr int32_t kCombinedRows = 4;  // of one task

std::atomic<int32_t> chosen_target{0};

// Items [0, count), which threads take one by one, so that those who find less to do take more.
// Each begins in a range of its own and then helps in the others': items that follow each other
// read memory that does, and the end of one fetches what the next begins with.
class Items {
 public:
  void offer(int64_t count, int32_t ranges) {
    count_ = count;
    ranges_ = std::min(ranges, kMostRanges);
    for (int32_t i = 0; i < ranges_; ++i) next_[i] = begin(i);
  }
  template <class F>
  void take(int32_t thread, const F& f) {
    for (int32_t i = 0; i < ranges_; ++i) {
      const int32_t range = (thread + i) % ranges_;
      const int64_t end = begin(range + 1);
      for (int64_t item; (item = next_[range].fetch_add(1, std::memory_order_relaxed)) < end;) {
        f(item);
      }
    }
  }

 private:
  static constexpr int32_t kMostRanges = 64;

  int64_t begin(int32_t range) const { return count_ * range / ranges_; }

  int64_t count_ = 0;
  int32_t ranges_ = 1;
  std::atomic<int64_t> next_[kMostRanges];
};

// Work for all threads.
struct Job {
  const AttentionParams& params;
  const Plan plan;
  const Kernels& kernels;
  Items items;
};

void run_units(void* context, int32_t thread) {
  Job& job = *static_cast<Job*>(context);
  const Scratch scratch = scratch_of(job.plan, job.params, thread);
  int64_t next = -1;
  job.items.take(thread, [&](int64_t i) {
    Unit unit = unit_at(job.plan, job.params, i);
    unit.follows = i == next && unit.split > 0;
    next = i + 1;
    job.kernels.run_unit(job.params, job.plan, unit, scratch);
  });
}

int64_t combinations(const Plan& plan) {
  return plan.blocks * ((plan.block_rows + kCombinedRows - 1) / kCombinedRows);
}

void combine(void* context, int32_t thread) {
  Job& job = *static_cast<Job*>(context);
  const Plan& plan = job.plan;
  const Scratch scratch = scratch_of(plan, job.params, thread);
  const int64_t of_block = combinations(plan) / plan.blocks;
  job.items.take(thread, [&](int64_t i) {
    const Unit unit = unit_at(plan, job.params, i / of_block * plan.splits);
    const int32_t first = static_cast<int32_t>(i % of_block) * kCombinedRows;
    const int32_t count = std::min(kCombinedRows, unit.rows - first);
    job.kernels.combine_rows(job.params, plan, unit, scratch, first, count);
  });
}

Status check_pointers(const AttentionParams& a) {
  const struct {
    const char* name;
    const void* pointer;
  } needed[] = {{"q", a.q}, {"k", a.k}, {"y", a.y}};
  for (const auto& [name, pointer] : needed) {
    if (pointer == nullptr) return failure(Code::kInvalid, "%s is a null pointer", name);
  }
  if ((a.attn_mask == nullptr) != (a.mask_dtype == DType::kNone)) {
    return failure(Code::kInvalid, "attn_mask at %p with mask_dtype %s: give both or neither",
                   a.attn_mask, name_of(a.mask_dtype));
  }
  return ok();
}

}  // namespace

Status supports(const AttentionParams& params) { return check_sizes(params); }

size_t workspace_bytes(const AttentionParams& params, int32_t threads) {
  if (threads < 1 || supports(params).code != Code::kOk) return 0;
  return workspace_bytes(make_plan(params), params, threads);
}

Status run(const AttentionParams& params, const ThreadPool& pool) {
  for (const Status& status : {check_sizes(params), check_pointers(params)}) {
    if (status.code != Code::kOk) return status;
  }
  if (pool.threads < 1 || pool.parallel_for == nullptr) {
    return failure(Code::kInvalid,
                   "a pool of %d threads, parallel_for at %p: at least one, and a "
                   "function",
                   pool.threads, reinterpret_cast<const void*>(pool.parallel_for));
  }
  const Plan plan = make_plan(params);
  if (params.workspace == nullptr) {
    return failure(Code::kInvalid, "workspace is null; this call needs %zu bytes",
                   workspace_bytes(plan, params, pool.threads));
  }
  Job job{params, plan, *available_kernels(chosen_target.load()), {}};
  const auto on_all_threads = [&](void (*task)(void*, int32_t), int64_t items) {
    const auto most = static_cast<int32_t>(std::min<int64_t>(pool.threads, items));
    const int32_t tasks = plan.is_small ? 1 : most;
    // Units that are no splits come in the order of their sizes, and are taken in that.
    job.items.offer(items, plan.splits > 1 ? tasks : 1);
    if (tasks == 1) return task(&job, 0);
    pool.parallel_for(pool.pool, tasks, task, &job);
  };
  on_all_threads(&run_units, plan.units);
  if (plan.splits > 1) on_all_threads(&combine, combinations(plan));
  return ok();
}

}  // namespace fastmqa::cpu

int32_t fastmqa_cpu_supports(const fastmqa::AttentionParams* params, char* text,
                             size_t text_bytes) {
  return fastmqa::report(fastmqa::cpu::supports(*params), text, text_bytes);
}

size_t fastmqa_cpu_workspace_bytes(const fastmqa::AttentionParams* params, int32_t threads) {
  return fastmqa::cpu::workspace_bytes(*params, threads);
}

int32_t fastmqa_cpu_run(const fastmqa::AttentionParams* params,
                        const fastmqa::cpu::ThreadPool* pool, char* text, size_t text_bytes) {
  return fastmqa::report(fastmqa::cpu::run(*params, *pool), text, text_bytes);
}

const char* fastmqa_cpu_target(int32_t i) {
  const fastmqa::cpu::Kernels* kernels = fastmqa::cpu::available_kernels(i);
  return kernels == nullptr ? nullptr : kernels->name;
}

void fastmqa_cpu_use_target(int32_t i) { fastmqa::cpu::chosen_target = i; }
