// SPDX-License-Identifier: MIT
//
// What onnxruntime calls when it loads the library.
#include <memory>
#include <string>
#include <vector>

#include "attention_op.h"

namespace fastmqa::ort {
namespace {

constexpr uint32_t kFirstApi = 1;  // which every onnxruntime has

// Sessions keep pointers into it, and may outlive whatever could free it: it is never freed.
const Ort::CustomOpDomain& domain() {
  static const auto* made = [] {
    auto* custom = new Ort::CustomOpDomain(op::kDomain);
    for (const Provider& provider : providers()) {
      for (const ONNXTensorElementDataType type :
           {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
            ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16}) {
        custom->Add(new AttentionOp(provider, type));
      }
    }
    return custom;
  }();
  return *made;
}

OrtStatus* too_old(const OrtApiBase& base) {
  const std::string text =
      "libfastmqa_ort.so was built for version " + std::to_string(ORT_API_VERSION) +
      " of onnxruntime's API, and this is onnxruntime " + base.GetVersionString() +
      ", which is older: upgrade onnxruntime, or build the library with its headers";
  return base.GetApi(kFirstApi)->CreateStatus(ORT_NOT_IMPLEMENTED, text.c_str());
}

}  // namespace
}  // namespace fastmqa::ort

extern "C" [[gnu::visibility("default")]] OrtStatus* ORT_API_CALL
RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) return fastmqa::ort::too_old(*base);
  Ort::InitApi(api);
  try {
    return api->AddCustomOpDomain(options, fastmqa::ort::domain());
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_RUNTIME_EXCEPTION, error.what());
  }
}
