// SPDX-License-Identifier: MIT
//
// attention.h on onnxruntime's CUDA stream.
#include "../op/refusal.h"
#include "memory.h"
#include "provider.h"

namespace fastmqa::ort {
namespace {

class CudaKernels : public Kernels {
 public:
  explicit CudaKernels(const OrtKernelInfo* node) : allocator_(node) {
    int ordinal = 0;
    Ort::ThrowOnError(Ort::GetApi().MemoryInfoGetId(allocator_.info(), &ordinal));
    op::require(query_device(ordinal, &device_));
  }

  void run(const AttentionParams& call, const Ort::KernelContext& context) const override {
    AttentionParams with_workspace = call;
    // Freed when all is enqueued: its stream is the only one that may get the memory then.
    const Memory workspace = scratch(workspace_bytes(call, device_), context);
    with_workspace.workspace = workspace.get();
    auto* stream = static_cast<CUstream_st*>(context.GetGPUComputeStream());
    op::require(fastmqa::run(with_workspace, device_, stream));
  }

 private:
  Memory scratch(size_t bytes, const Ort::KernelContext& context) const {
    void* memory = nullptr;
    if (bytes > 0) {
      Ort::ThrowOnError(Ort::GetApi().KernelContext_GetScratchBuffer(
          context.GetOrtKernelContext(), allocator_.info(), bytes, &memory));
    }
    return Memory(memory, {allocator_.get()});
  }

  Allocator allocator_;
  Device device_{};
};

const bool kEntered =
    enter({"CUDAExecutionProvider", [](const OrtKernelInfo* node) -> std::unique_ptr<Kernels> {
             return std::make_unique<CudaKernels>(node);
           }});

}  // namespace
}  // namespace fastmqa::ort
