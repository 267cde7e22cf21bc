// SPDX-License-Identifier: MIT
//
// attention.h: from arguments to launches.
#include <fastmqa/arch/launch.cuh>
#include <fastmqa/attention.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "check.h"
#include "describe.h"
#include "plan.h"
#include "registry.h"

namespace fastmqa {
namespace {

// Arguments as the kernels take them: without v, the values are read where the keys are.
AttentionParams normalised(const AttentionParams& params) {
  AttentionParams a = params;
  if (a.v == nullptr) a.v_strides = a.k_strides;
  return a;
}

// The plan for arguments that are valid, or why there is none.
Status plan_for(const AttentionParams& a, const Device& device, Plan* plan) {
  if (const Status status = check_sizes(a); status.code != Code::kOk) return status;
  if (device.sm < kTuring || device.sm_count < 1 || device.shared_bytes < 1) {
    return failure(Code::kUnsupported,
                   "a device of SM%d with %d SMs and %d bytes of shared memory: SM75 and newer",
                   device.sm, device.sm_count, device.shared_bytes);
  }
  *plan = make_plan(a, device, registry().shared_bytes);
  if (plan->variant < 0) return no_variant(a, device, registry());
  return ok();
}

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
  return failure(Code::kCudaError, "launch of the %s kernel: %s", kernel, cudaGetErrorString(error));
}

int32_t report(const Status& status, char* text, size_t text_bytes) {
  if (text != nullptr && text_bytes > 0) std::snprintf(text, text_bytes, "%s", status.text);
  return static_cast<int32_t>(status.code);
}

size_t report(const std::string& json, char* text, size_t text_bytes) {
  if (text != nullptr && text_bytes > 0) std::snprintf(text, text_bytes, "%s", json.c_str());
  return json.size() + 1;
}

}  // namespace

Status supports(const AttentionParams& params, const Device& device) {
  Plan plan;
  return plan_for(normalised(params), device, &plan);
}

size_t workspace_bytes(const AttentionParams& params, const Device& device) {
  Plan plan;
  if (plan_for(normalised(params), device, &plan).code != Code::kOk) return 0;
  return plan.combine_grid == 0 ? 0 : partials_bytes(plan.params);
}

Status run(const AttentionParams& params, const Device& device, CUstream_st* stream) {
  const AttentionParams a = normalised(params);
  Plan plan;
  if (const Status status = plan_for(a, device, &plan); status.code != Code::kOk) return status;
  if (const Status status = check_memory(a); status.code != Code::kOk) return status;
  const bool splits = plan.combine_grid > 0;
  if (splits && a.workspace == nullptr) {
    return failure(Code::kInvalid, "workspace is null; this call needs %zu bytes",
                   partials_bytes(plan.params));
  }
  const Variant& variant = kVariants[plan.variant];
  if (a.v == nullptr && !variant.tile.values_in_k) plan.params.attention.v = a.k;

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

size_t fastmqa_workspace_bytes(const AttentionParams* params, const Device* device) {
  return fastmqa::workspace_bytes(*params, *device);
}

int32_t fastmqa_run(const AttentionParams* params, const Device* device, void* stream, char* text,
                    size_t text_bytes) {
  return fastmqa::report(fastmqa::run(*params, *device, static_cast<CUstream_st*>(stream)), text,
                         text_bytes);
}

int32_t fastmqa_query_device(int32_t ordinal, Device* device, char* text, size_t text_bytes) {
  return fastmqa::report(fastmqa::query_device(ordinal, device), text, text_bytes);
}

size_t fastmqa_describe_launches(const AttentionParams* params, const Device* device, char* json,
                                 size_t json_bytes) {
  fastmqa::Plan plan;
  const AttentionParams a = fastmqa::normalised(*params);
  const fastmqa::Status status = fastmqa::plan_for(a, *device, &plan);
  if (status.code == fastmqa::Code::kOk && a.v == nullptr &&
      !fastmqa::kVariants[plan.variant].tile.values_in_k) {
    plan.params.attention.v = a.k;
  }
  return fastmqa::report(fastmqa::describe(status, plan, fastmqa::registry()), json, json_bytes);
}

size_t fastmqa_describe_variants(char* json, size_t json_bytes) {
  return fastmqa::report(fastmqa::describe_variants(fastmqa::registry()), json, json_bytes);
}
