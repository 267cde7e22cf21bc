// SPDX-License-Identifier: MIT
//
// A node of a session: its tensors to a call of attention.h, whatever the provider.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <memory>
#include <string>

#include "../op/call.h"
#include "provider.h"

namespace fastmqa::ort {

class AttentionKernel {
 public:
  // Throws if the node contradicts the op, as far as that can be seen before a run.
  AttentionKernel(std::string name, const OrtKernelInfo* node, const Provider& provider);

  OrtStatus* ComputeV2(OrtKernelContext* context) const noexcept;  // as CustomOpBase names it

 private:
  void compute(const Ort::KernelContext& context) const;

  std::string name_;
  op::Attributes attributes_;
  bool has_lse_;
  std::unique_ptr<Kernels> kernels_;
};

}  // namespace fastmqa::ort
