// SPDX-License-Identifier: MIT
#include "tensors.h"

#include <algorithm>

namespace fastmqa::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using op::Descriptor;

Descriptor describe(DataType type, const Dims& dims) {
  Descriptor tensor{onnx_type_of(type), dims.nbDims, {}};
  std::copy_n(dims.d, std::clamp(dims.nbDims, 0, 4), tensor.dims);
  return tensor;
}

}  // namespace

int32_t onnx_type_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return 1;
    case DataType::kUINT8:
      return 2;
    case DataType::kINT8:
      return 3;
    case DataType::kINT32:
      return 6;
    case DataType::kINT64:
      return 7;
    case DataType::kBOOL:
      return 9;
    case DataType::kHALF:
      return 10;
    case DataType::kBF16:
      return 16;
    default:
      return 0;
  }
}

op::Inputs describe(const PluginTensorDesc* inputs) {
  op::Inputs described;
  for (int32_t i = 0; i < op::kInputs; ++i) described[i] = describe(inputs[i].type, inputs[i].dims);
  return described;
}

op::Inputs describe(const DynamicPluginTensorDesc* inputs) {
  op::Inputs described;
  for (int32_t i = 0; i < op::kInputs; ++i) {
    described[i] = describe(inputs[i].desc.type, inputs[i].desc.dims);
  }
  return described;
}

op::Inputs describe(const DynamicPluginTensorDesc* inputs, Dims DynamicPluginTensorDesc::* end) {
  op::Inputs described;
  for (int32_t i = 0; i < op::kInputs; ++i) {
    described[i] = describe(inputs[i].desc.type, inputs[i].*end);
  }
  return described;
}

bool is_type_accepted(int32_t position, const DynamicPluginTensorDesc* tensors) {
  const int32_t q_type = onnx_type_of(tensors[op::kQ].desc.type);
  const int32_t type = onnx_type_of(tensors[position].desc.type);
  if (position == op::kY) return type == q_type;
  if (position == op::kLse) return tensors[position].desc.type == DataType::kFLOAT;
  return op::accepts(op::kQ, q_type, q_type) &&
         op::accepts(static_cast<op::Tensor>(position), type, q_type);
}

}  // namespace fastmqa::trt
