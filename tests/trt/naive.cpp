// SPDX-License-Identifier: MIT
//
// attention.h's C++ functions by the C ones of naive_kernels.cpp, for the plugin's host code.
#include <fastmqa/attention.h>

namespace fastmqa {

Status supports(const AttentionParams& params, const Device& device) {
  Status status{};
  status.code = Code{fastmqa_supports(&params, &device, status.text, sizeof status.text)};
  return status;
}

int32_t distinct_tactics(const AttentionParams&, const Device&, int32_t (&tactics)[kTactics + 1]) {
  tactics[0] = 0;
  return 1;
}

size_t workspace_bound(const AttentionParams& largest, const Device& device) {
  return fastmqa_workspace_bound(&largest, &device);
}

Status run(const AttentionParams& params, const Device& device, CUstream_st* stream,
           int32_t tactic) {
  Status status{};
  status.code =
      Code{fastmqa_run(&params, &device, tactic, stream, status.text, sizeof status.text)};
  return status;
}

}  // namespace fastmqa
