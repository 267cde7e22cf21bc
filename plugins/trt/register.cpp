// SPDX-License-Identifier: MIT
//
// How TensorRT finds the creator: IPluginRegistry::loadLibrary() asks getCreators(); who only opens
// the library (Triton Inference Server, ctypes) has it registered as it is loaded.
#include <NvInferRuntime.h>

#include <atomic>

#include "attention_creator.h"
#include "loaded_tensorrt.h"
#include "log.h"

namespace fastmqa::trt {
namespace {

AttentionCreator& creator() {
  static AttentionCreator one;
  return one;
}

class Registration {
 public:
  Registration() noexcept {
    using GetRegistry = nvinfer1::IPluginRegistry*() noexcept;
    auto* get = reinterpret_cast<GetRegistry*>(find_in_tensorrt("getPluginRegistry"));
    if (get == nullptr || (registry_ = get()) == nullptr) return;
    const bool is_known = registry_->getCreator(op::kName, kPluginVersion, op::kDomain) != nullptr;
    stands_ = !is_known && registry_->registerCreator(creator(), op::kDomain);
  }

  ~Registration() { withdraw(); }

  void withdraw() noexcept {
    if (stands_.exchange(false)) registry_->deregisterCreator(creator());
  }

 private:
  nvinfer1::IPluginRegistry* registry_ = nullptr;
  std::atomic<bool> stands_ = false;
};

Registration registration;

}  // namespace
}  // namespace fastmqa::trt

extern "C" {

[[gnu::visibility("default")]] nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
  // loadLibrary(), which asks, registers the creator itself, and fails if it is there already.
  fastmqa::trt::registration.withdraw();
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&fastmqa::trt::creator()};
  count = 1;
  return creators;
}

[[gnu::visibility("default")]] void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  fastmqa::trt::set_logger_finder(finder);
}

}  // extern "C"
