// SPDX-License-Identifier: MIT
//
// From a call's arguments to its plan, for the library and for its planner without kernels.
#pragma once

#include <fastmqa/attention.h>

#include <cstdio>
#include <string>

#include "check.h"
#include "describe.h"
#include "plan.h"
#include "registry.h"

namespace fastmqa {

// Arguments as the kernels take them: without v, the values are read where the keys are.
inline AttentionParams normalised(const AttentionParams& params) {
  AttentionParams a = params;
  if (a.v == nullptr) a.v_strides = a.k_strides;
  return a;
}

// The plan for normalised arguments whose sizes are valid, or why there is none.
inline Status plan_for(const AttentionParams& a, const Device& device, int32_t tactic, Plan* plan) {
  if (const Status status = check_sizes(a); status.code != Code::kOk) return status;
  if (device.sm < kTuring || device.sm_count < 1 || device.shared_bytes < 1) {
    return failure(Code::kUnsupported,
                   "a device of SM%d with %d SMs and %d bytes of shared memory: SM75 and newer",
                   device.sm, device.sm_count, device.shared_bytes);
  }
  if (tactic < 0 || tactic > kTactics) {
    return failure(Code::kInvalid, "tactic %d; there are 0 to %d", tactic, kTactics);
  }
  *plan = make_plan(a, device, registry().shared_bytes, tactic);
  if (plan->variant < 0) return no_variant(a, device, registry());
  if (a.v == nullptr && !kVariants[plan->variant].tile.values_in_k) {
    plan->params.attention.v = a.k;
  }
  return ok();
}

// For the C functions: JSON, and the bytes that the whole of it takes.
inline size_t report(const std::string& json, char* text, size_t text_bytes) {
  if (text != nullptr && text_bytes > 0) std::snprintf(text, text_bytes, "%s", json.c_str());
  return json.size() + 1;
}

inline size_t describe_launches(const AttentionParams& params, const Device& device, int32_t tactic,
                                char* json, size_t json_bytes) {
  Plan plan{};
  const Status status = plan_for(normalised(params), device, tactic, &plan);
  return report(describe(status, plan, registry()), json, json_bytes);
}

inline size_t describe_variants(char* json, size_t json_bytes) {
  return report(describe_variants(registry()), json, json_bytes);
}

}  // namespace fastmqa
