// SPDX-License-Identifier: MIT
#pragma once

#include <onnxruntime_cxx_api.h>

#include "../op/contract.h"

namespace fastmqa::ort {

// The attributes of a node. Throws Refusal if one is of another type, or has a value that the op
// refuses.
op::Attributes read_attributes(const OrtKernelInfo* node);

}  // namespace fastmqa::ort
