// SPDX-License-Identifier: MIT
//
// Scratch memory from onnxruntime's allocator for a node.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <memory>

namespace fastmqa::ort {

class Allocator {
 public:
  explicit Allocator(const OrtKernelInfo* node) {
    OrtAllocator* found = nullptr;
    Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAllocator(node, OrtMemTypeDefault, &found));
    allocator_.reset(found);
  }

  OrtAllocator* get() const { return allocator_.get(); }
  const OrtMemoryInfo* info() const { return allocator_->Info(allocator_.get()); }

 private:
  struct Release {
    void operator()(OrtAllocator* allocator) const { Ort::GetApi().ReleaseAllocator(allocator); }
  };
  std::unique_ptr<OrtAllocator, Release> allocator_;
};

struct Free {
  OrtAllocator* allocator;
  void operator()(void* memory) const { allocator->Free(allocator, memory); }
};
using Memory = std::unique_ptr<void, Free>;

}  // namespace fastmqa::ort
