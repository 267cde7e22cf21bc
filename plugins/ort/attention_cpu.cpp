// SPDX-License-Identifier: MIT
//
// attention_cpu.h on onnxruntime's thread pool.
#include <fastmqa/attention_cpu.h>

#include <algorithm>
#include <thread>

#include "../op/refusal.h"
#include "memory.h"
#include "provider.h"

namespace fastmqa::ort {
namespace {

// onnxruntime's pool runs what is given to it on as many threads as the session has. It does not
// say how many those are; the kernel takes its work item by item, so that more tasks than threads
// cost a little memory, and the machine's number will do.
class PoolOfRun {
 public:
  PoolOfRun(const Ort::KernelContext& context, int32_t threads)
      : context_(context), threads_(threads) {}

  cpu::ThreadPool get() { return {this, threads_, &parallel_for}; }

 private:
  struct Loop {
    void (*task)(void* context, int32_t i);
    void* context;
  };

  static void parallel_for(void* pool, int32_t count, void (*task)(void*, int32_t), void* context) {
    Loop loop{task, context};
    const auto call = [](void* loop, size_t i) {
      static_cast<const Loop*>(loop)->task(static_cast<const Loop*>(loop)->context,
                                           static_cast<int32_t>(i));
    };
    static_cast<PoolOfRun*>(pool)->context_.ParallelFor(
        call, static_cast<size_t>(count), /* num_batch = */ 0, &loop);  // 0: as many as threads
  }

  const Ort::KernelContext& context_;
  int32_t threads_;
};

class CpuKernels : public Kernels {
 public:
  explicit CpuKernels(const OrtKernelInfo* node)
      : allocator_(node),
        threads_(static_cast<int32_t>(std::max(1U, std::thread::hardware_concurrency()))) {}

  void run(const AttentionParams& call, const Ort::KernelContext& context) const override {
    PoolOfRun pool(context, threads_);
    AttentionParams with_workspace = call;
    const Memory workspace = scratch(cpu::workspace_bytes(call, threads_));
    with_workspace.workspace = workspace.get();
    op::require(cpu::run(with_workspace, pool.get()));
  }

 private:
  Memory scratch(size_t bytes) const {
    OrtAllocator* allocator = allocator_.get();
    return Memory(bytes > 0 ? allocator->Alloc(allocator, bytes) : nullptr, {allocator});
  }

  Allocator allocator_;
  int32_t threads_;
};

const bool kEntered =
    enter({"CPUExecutionProvider", [](const OrtKernelInfo* node) -> std::unique_ptr<Kernels> {
             return std::make_unique<CpuKernels>(node);
           }});

}  // namespace
}  // namespace fastmqa::ort
