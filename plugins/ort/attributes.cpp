// SPDX-License-Identifier: MIT
#include "attributes.h"

#include <limits>

#include "../op/refusal.h"

namespace fastmqa::ort {
namespace {

bool succeeded(OrtStatus* status) { return Ort::Status(status).IsOK(); }

// Whether the node has the attribute, as any of the types that the op's attributes could be
// mistaken for. onnxruntime says no more than that it cannot be read as the type asked for.
bool has(const OrtKernelInfo* node, const char* name) {
  const OrtApi& api = Ort::GetApi();
  float number;
  int64_t integer;
  size_t size = 0;
  return succeeded(api.KernelInfoGetAttribute_float(node, name, &number)) ||
         succeeded(api.KernelInfoGetAttribute_int64(node, name, &integer)) ||
         succeeded(api.KernelInfoGetAttribute_string(node, name, nullptr, &size)) ||
         succeeded(api.KernelInfoGetAttributeArray_float(node, name, nullptr, &size)) ||
         succeeded(api.KernelInfoGetAttributeArray_int64(node, name, nullptr, &size));
}

void read(const OrtKernelInfo* node, const char* name, float& value) {
  if (succeeded(Ort::GetApi().KernelInfoGetAttribute_float(node, name, &value))) return;
  if (has(node, name)) op::refuse("attribute %s is not a float", name);
}

void read(const OrtKernelInfo* node, const char* name, int32_t& value) {
  int64_t given = 0;
  if (!succeeded(Ort::GetApi().KernelInfoGetAttribute_int64(node, name, &given))) {
    if (has(node, name)) op::refuse("attribute %s is not an int", name);
    return;
  }
  value = static_cast<int32_t>(given);
  if (value != given) {
    op::refuse("%s=%lld; attributes are numbers of 32 bits", name, static_cast<long long>(given));
  }
}

}  // namespace

op::Attributes read_attributes(const OrtKernelInfo* node) {
  op::Attributes a;
  if (!has(node, "scale")) op::refuse("attribute scale is missing; usual is 1/sqrt(D)");
  read(node, "scale", a.scale);
  read(node, "is_causal", a.is_causal);
  read(node, "window_left", a.window_left);
  read(node, "window_right", a.window_right);
  read(node, "softcap", a.softcap);
  read(node, "softmax_precision", a.softmax_precision);
  read(node, "v_head_size", a.v_head_size);
  read(node, "layout", a.layout);
  read(node, "features", a.features);
  op::check_attributes(a);
  return a;
}

}  // namespace fastmqa::ort
