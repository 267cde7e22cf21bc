// SPDX-License-Identifier: MIT
#pragma once

#include <onnxruntime_cxx_api.h>

namespace fastmqa::ort {

// Says the shapes of y and lse where all their sizes are known, as numbers or by name. Never fails:
// the kernel refuses what is wrong.
OrtStatus* infer_output_shapes(const OrtCustomOp*, OrtShapeInferContext* context) noexcept;

}  // namespace fastmqa::ort
