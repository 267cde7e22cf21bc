// SPDX-License-Identifier: MIT
#include "attention_kernel.h"

#include <algorithm>
#include <array>
#include <utility>

#include "../op/refusal.h"
#include "attributes.h"
#include "guard.h"

namespace fastmqa::ort {
namespace {

op::Descriptor describe(const Ort::ConstTensorTypeAndShapeInfo& tensor) {
  op::Descriptor found{};
  found.type = tensor.GetElementType();
  const size_t rank = tensor.GetDimensionsCount();
  found.rank = static_cast<int32_t>(rank);
  // Of larger ranks no more is looked at: they are refused.
  Ort::ThrowOnError(
      Ort::GetApi().GetDimensions(tensor, found.dims, std::min(rank, std::size(found.dims))));
  return found;
}

// What the graph says of them: onnxruntime gives a shape that is not known as rank 0.
op::Inputs inputs_of(const Ort::ConstKernelInfo& node) {
  op::Inputs inputs{};
  for (int32_t i = 0; i < op::kInputs; ++i) {
    const Ort::TypeInfo type = node.GetInputTypeInfo(static_cast<size_t>(i));
    inputs[i] = describe(type.GetTensorTypeAndShapeInfo());
    if (inputs[i].rank == 0) inputs[i].rank = op::Descriptor::kUnknown;
  }
  return inputs;
}

}  // namespace

AttentionKernel::AttentionKernel(std::string name, const OrtKernelInfo* node,
                                 const Provider& provider)
    : name_(std::move(name)), attributes_(read_attributes(node)) {
  const Ort::ConstKernelInfo info(node);
  constexpr size_t kLse = op::kLse - op::kInputs;
  has_lse_ = info.GetOutputCount() > kLse && !info.GetOutputName(kLse).empty();
  if (has_lse_ && !attributes_.has(op::kFeatureLse)) {
    op::refuse("it has the output lse, and features=%d lacks bit 16", attributes_.features);
  }
  op::check_inputs(attributes_, inputs_of(info));
  kernels_ = provider.create(node);
}

OrtStatus* AttentionKernel::ComputeV2(OrtKernelContext* context) const noexcept {
  return guard(name_, [&] { compute(Ort::KernelContext(context)); });
}

void AttentionKernel::compute(const Ort::KernelContext& context) const {
  op::Inputs inputs;
  std::array<const void*, op::kInputs> data;
  for (int32_t i = 0; i < op::kInputs; ++i) {
    const Ort::ConstValue value = context.GetInput(static_cast<size_t>(i));
    inputs[i] = describe(value.GetTensorTypeAndShapeInfo().GetConst());
    data[i] = value.GetTensorRawData();
  }
  op::check_inputs(attributes_, inputs);

  AttentionParams call = op::describe_call(attributes_, inputs);
  op::set_inputs(attributes_, data.data(), call);

  std::array<int64_t, 4> y_shape;
  std::copy_n(inputs[op::kQ].dims, 4, y_shape.begin());
  y_shape[3] = call.v_head_size;
  call.y = context.GetOutput(op::kY - op::kInputs, y_shape.data(), y_shape.size())
               .GetTensorMutableRawData();
  if (has_lse_) {
    const std::array<int64_t, 3> lse_shape = {call.batch, call.heads, call.queries};
    call.lse = context.GetOutput(op::kLse - op::kInputs, lse_shape.data(), lse_shape.size())
                   .GetTensorMutableData<float>();
  }
  if (call.batch == 0 || call.queries == 0) return;  // nothing to write
  kernels_->run(call, context);
}

}  // namespace fastmqa::ort
