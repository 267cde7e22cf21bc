// SPDX-License-Identifier: MIT
#include "attention_op.h"

#include "guard.h"
#include "shape_inference.h"

namespace fastmqa::ort {

AttentionOp::AttentionOp(const Provider& provider, ONNXTensorElementDataType type)
    : provider_(provider), type_(type) {
  // Not through CustomOpBase, whose wrapper may throw.
  InferOutputShapeFn = &infer_output_shapes;
}

OrtStatus* AttentionOp::CreateKernelV2(const OrtApi&, const OrtKernelInfo* node,
                                       void** kernel) const noexcept {
  std::string name;
  return guard(name, [&] {
    name = Ort::ConstKernelInfo(node).GetNodeName();
    *kernel = new AttentionKernel(name, node, provider_);
  });
}

ONNXTensorElementDataType AttentionOp::GetInputType(size_t index) const {
  switch (index) {
    case op::kQ:
      return type_;
    case op::kLengths:
    case op::kQStart:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    default:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;  // any
  }
}

ONNXTensorElementDataType AttentionOp::GetOutputType(size_t index) const {
  return index == op::kY - op::kInputs ? type_ : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

OrtCustomOpInputOutputCharacteristic AttentionOp::GetOutputCharacteristic(size_t index) const {
  return index == op::kY - op::kInputs ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
}

}  // namespace fastmqa::ort
