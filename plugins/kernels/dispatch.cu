// SPDX-License-Identifier: MIT
//
// attention.h: from arguments to launches.
#include <fastmqa/attention.h>

#include <algorithm>
#include <fastmqa/arch/launch.cuh>

#include "call.h"

namespace fastmqa {
namespace {

Kernel combine_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return registry().combine_float16;
    case DType::kBFloat16:
      return registry().combine_bfloat16;
    default:
      return registry().combine_float32;
  }
}

Status launch_status(const char* kernel, cudaError_t error) {
  if (error == cudaSuccess) return ok();
  return failure(Code::kCudaError, "launch of the %s kernel: %s", kernel,
                 cudaGetErrorString(error));
}

}  // namespace

Status supports(const AttentionParams& params, const Device& device) {
  Plan plan{};
  return plan_for(normalised(params), device, 0, &plan);
}

int32_t distinct_tactics(const AttentionParams& params, const Device& device,
                         int32_t (&tactics)[kTactics + 1]) {
  Plan plans[kTactics + 1];
  int32_t count = 0;
  for (int32_t tactic = 0; tactic <= kTactics; ++tactic) {
    Plan& plan = plans[count];
    if (plan_for(normalised(params), device, tactic, &plan).code != Code::kOk) return 0;
    const bool is_new = std::none_of(plans, &plan, [&](const Plan& other) {
      return other.variant == plan.variant && other.params.splits == plan.params.splits;
    });
    if (is_new) tactics[count++] = tactic;
  }
  return count;
}

size_t workspace_bytes(const AttentionParams& params, const Device& device, int32_t tactic) {
  Plan plan{};
  if (plan_for(normalised(params), device, tactic, &plan).code != Code::kOk) return 0;
  return plan.combine_grid == 0 ? 0 : partials_bytes(plan.params);
}

size_t workspace_bound(const AttentionParams& largest, const Device& device) {
  return bound_of_workspace(normalised(largest), device, registry().shared_bytes);
}

Status run(const AttentionParams& params, const Device& device, CUstream_st* stream,
           int32_t tactic) {
  const AttentionParams a = normalised(params);
  Plan plan{};
  if (const Status status = plan_for(a, device, tactic, &plan); status.code != Code::kOk) {
    return status;
  }
  if (const Status status = check_memory(a); status.code != Code::kOk) return status;
  const bool splits = plan.combine_grid > 0;
  if (splits && a.workspace == nullptr) {
    return failure(Code::kInvalid, "workspace is null; this call needs %zu bytes",
                   partials_bytes(plan.params));
  }
  const Variant& variant = kVariants[plan.variant];
  const cudaError_t error =
      launch(registry().attention[plan.variant], plan.grid, threads_of(variant.tile),
             registry().shared_bytes[plan.variant], stream, plan.params);
  if (error != cudaSuccess || !splits) return launch_status("attention", error);
  return launch_status("combine", launch(combine_of(a.dtype), plan.combine_grid, 32 * kCombineRows,
                                         0, stream, plan.params));
}

Status query_device(int ordinal, Device* device) {
  int major = 0, minor = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } queries[] = {{cudaDevAttrComputeCapabilityMajor, &major},
                 {cudaDevAttrComputeCapabilityMinor, &minor},
                 {cudaDevAttrMultiProcessorCount, &device->sm_count},
                 {cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_bytes}};
  for (const auto& [attribute, value] : queries) {
    if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, ordinal)) {
      return failure(Code::kCudaError, "CUDA device %d: %s", ordinal, cudaGetErrorString(error));
    }
  }
  device->sm = 10 * major + minor;
  return ok();
}

}  // namespace fastmqa

using fastmqa::AttentionParams;
using fastmqa::Device;

int32_t fastmqa_supports(const AttentionParams* params, const Device* device, char* text,
                         size_t text_bytes) {
  return fastmqa::report(fastmqa::supports(*params, *device), text, text_bytes);
}

size_t fastmqa_workspace_bytes(const AttentionParams* params, const Device* device,
                               int32_t tactic) {
  return fastmqa::workspace_bytes(*params, *device, tactic);
}

size_t fastmqa_workspace_bound(const AttentionParams* largest, const Device* device) {
  return fastmqa::workspace_bound(*largest, *device);
}

int32_t fastmqa_run(const AttentionParams* params, const Device* device, int32_t tactic,
                    void* stream, char* text, size_t text_bytes) {
  const fastmqa::Status status =
      fastmqa::run(*params, *device, static_cast<CUstream_st*>(stream), tactic);
  return fastmqa::report(status, text, text_bytes);
}

int32_t fastmqa_query_device(int32_t ordinal, Device* device, char* text, size_t text_bytes) {
  return fastmqa::report(fastmqa::query_device(ordinal, device), text, text_bytes);
}

size_t fastmqa_describe_launches(const AttentionParams* params, const Device* device,
                                 int32_t tactic, char* json, size_t json_bytes) {
  return fastmqa::describe_launches(*params, *device, tactic, json, json_bytes);
}

size_t fastmqa_describe_variants(char* json, size_t json_bytes) {
  return fastmqa::describe_variants(json, json_bytes);
}
