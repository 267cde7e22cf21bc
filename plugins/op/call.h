// SPDX-License-Identifier: MIT
//
// From the shapes and types of a node's tensors to a call of attention.h.
#pragma once

#include <fastmqa/attention.h>

#include <array>

#include "contract.h"

namespace fastmqa::op {

// A contiguous tensor of a node.
struct Descriptor {
  static constexpr int32_t kUnknown = -1;  // as a rank, and as a dimension

  int32_t type;  // number of onnx.TensorProto.DataType
  int32_t rank;
  int64_t dims[4];
};
using Inputs = std::array<Descriptor, kInputs>;

// Whether a tensor may be of `type`, a number of onnx.TensorProto.DataType, beside queries of
// theirs.
bool accepts(Tensor tensor, int32_t type, int32_t q_type);

// Refuses types and shapes of live inputs that contradict the op or each other; what is not known
// yet agrees with everything.
void check_inputs(const Attributes& attributes, const Inputs& inputs);

// The call of inputs that are checked and known, without addresses and workspace.
AttentionParams describe_call(const Attributes& attributes, const Inputs& inputs);

// Gives a call the addresses of the inputs that are live.
void set_inputs(const Attributes& attributes, const void* const* inputs, AttentionParams& call);

}  // namespace fastmqa::op
