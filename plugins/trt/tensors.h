// SPDX-License-Identifier: MIT
//
// TensorRT's descriptions of tensors as those of ../op.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>

#include "../op/call.h"

namespace fastmqa::trt {

// Number of onnx.TensorProto.DataType; 0 for types that no tensor of the op has.
int32_t onnx_type_of(nvinfer1::DataType type);

op::Inputs describe(const nvinfer1::PluginTensorDesc* inputs);

// As the network has them: what changes within a profile is -1, Descriptor::kUnknown.
op::Inputs describe(const nvinfer1::DynamicPluginTensorDesc* inputs);

// At one end of the profile: its min, opt or max.
op::Inputs describe(const nvinfer1::DynamicPluginTensorDesc* inputs,
                    nvinfer1::Dims nvinfer1::DynamicPluginTensorDesc::* end);

// Whether the tensor at `position` (outputs follow inputs) may be of its type, beside queries of
// theirs. An input that is not live has a type all the same: one that it could have if it were.
bool is_type_accepted(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors);

}  // namespace fastmqa::trt
