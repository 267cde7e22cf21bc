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

// Refuses types and shapes of live inputs that contradict the op or each other; what is not known
// yet agrees with everything.
void check_inputs(const Attributes& attributes, const Inputs& inputs);

// The call of inputs that are checked and known, without addresses and workspace.
AttentionParams describe_call(const Attributes& attributes, const Inputs& inputs);

}  // namespace fastmqa::op
