// SPDX-License-Identifier: MIT
//
// fastmqa::FusedAttention of one provider and one type of q as onnxruntime's custom op.
#pragma once

#include <onnxruntime_cxx_api.h>

#include "../op/contract.h"
#include "attention_kernel.h"
#include "provider.h"

namespace fastmqa::ort {

// onnxruntime makes one schema of all ops of a name, and takes the kernel whose types fit a node's.
// Only q, y and lse, lengths and positions have a type there: k, v and attn_mask are left to the
// kernel, whose message says more, and which would have to exist for each type of mask otherwise.
class AttentionOp
    : public Ort::CustomOpBase<AttentionOp, AttentionKernel, /* WithStatus = */ true> {
 public:
  AttentionOp(const Provider& provider, ONNXTensorElementDataType type);

  OrtStatus* CreateKernelV2(const OrtApi&, const OrtKernelInfo* node, void** kernel) const noexcept;

  const char* GetName() const { return op::kName; }
  const char* GetExecutionProviderType() const { return provider_.name; }
  size_t GetInputTypeCount() const { return op::kInputs; }
  size_t GetOutputTypeCount() const { return op::kOutputs; }
  ONNXTensorElementDataType GetInputType(size_t index) const;
  ONNXTensorElementDataType GetOutputType(size_t index) const;
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t index) const;

 private:
  Provider provider_;
  ONNXTensorElementDataType type_;
};

}  // namespace fastmqa::ort
