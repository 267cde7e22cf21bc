// SPDX-License-Identifier: MIT
#include "call.h"

#include <cinttypes>
#include <iterator>
#include <limits>
#include <string>

#include "refusal.h"

namespace fastmqa::op {
namespace {

constexpr int32_t kInt32 = 6;  // of onnx.TensorProto.DataType, like those of DType
constexpr int64_t kUnknown = Descriptor::kUnknown;

// Sizes and types of calls are judged by whether there is a v, never by what it points to.
constexpr char kAnywhere = 0;

std::string name_of(int32_t type) {
  constexpr const char* kNames[] = {"undefined",  "float32", "uint8",  "int8",   "uint16",
                                    "int16",      "int32",   "int64",  "string", "bool",
                                    "float16",    "float64", "uint32", "uint64", "complex64",
                                    "complex128", "bfloat16"};
  const auto index = static_cast<size_t>(type);
  return index < std::size(kNames) ? kNames[index] : "type " + std::to_string(type);
}

std::string text_of(const Descriptor& tensor) {
  std::string text = "(";
  for (int32_t i = 0; i < tensor.rank; ++i) {
    const int64_t size = tensor.dims[i];
    text.append(i == 0 ? "" : ", ").append(size == kUnknown ? "?" : std::to_string(size));
  }
  return text + ")";
}

bool is(int32_t type, DType dtype) { return type == static_cast<int32_t>(dtype); }

std::string accepted_types(Tensor tensor, int32_t q_type) {
  switch (tensor) {
    case kQ:
      return "float16, bfloat16 or float32";
    case kMask:
      return "bool, float32 or " + name_of(q_type) + " as q";
    case kLengths:
    case kQStart:
      return "int32";
    default:
      return name_of(q_type) + " as q";
  }
}

void check_type(const Inputs& inputs, Tensor tensor) {
  const int32_t type = inputs[tensor].type, q_type = inputs[kQ].type;
  if (accepts(tensor, type, q_type)) return;
  refuse("%s is %s; it must be %s", kTensorNames[tensor], name_of(type).c_str(),
         accepted_types(tensor, q_type).c_str());
}

void check_rank(const Inputs& inputs, Tensor tensor, int32_t rank, const char* shape) {
  const Descriptor& found = inputs[tensor];
  if (found.rank == rank || found.rank == kUnknown) return;
  refuse("%s has rank %d; it must be %s", kTensorNames[tensor], found.rank, shape);
}

// `size` is what dimension `axis` must be; of `broadcast` tensors 1 will do.
void check_size(const Inputs& inputs, Tensor tensor, int32_t axis, const char* letter, int64_t size,
                bool broadcast = false) {
  const Descriptor& found = inputs[tensor];
  if (found.rank == kUnknown || found.dims[axis] == kUnknown || size == kUnknown) return;
  if (found.dims[axis] == size || (broadcast && found.dims[axis] == 1)) return;
  refuse("%s is %s: its dimension %d is %s of the other tensors, %" PRId64 "%s",
         kTensorNames[tensor], text_of(found).c_str(), axis, letter, size,
         broadcast ? ", or 1" : "");
}

struct Sizes {
  int64_t batch, heads, kv_heads, queries, keys, head_size, v_head_size;
};

int64_t size_of(const Descriptor& tensor, int32_t axis) {
  return tensor.rank == kUnknown ? kUnknown : tensor.dims[axis];
}

// Of inputs whose ranks are checked.
Sizes sizes_of(const Attributes& a, const Inputs& inputs) {
  const Descriptor &q = inputs[kQ], &k = inputs[kK];
  return {.batch = size_of(q, 0),
          .heads = size_of(q, a.rows_first() ? 2 : 1),
          .kv_heads = size_of(k, 1),
          .queries = size_of(q, a.rows_first() ? 1 : 2),
          .keys = size_of(k, 2),
          .head_size = size_of(q, 3),
          .v_head_size = a.has(kFeatureValuesInK) ? a.v_head_size : size_of(inputs[kV], 3)};
}

int32_t to_int32(const char* letter, int64_t size) {
  if (size > std::numeric_limits<int32_t>::max()) {
    refuse("%s is %" PRId64 "; sizes are below 2^31", letter, size);
  }
  return static_cast<int32_t>(size);
}

// Of contiguous (B, heads, rows, columns), or (B, rows, heads, columns) if `rows_first`.
Strides strides_of(int64_t heads, int64_t rows, int64_t columns, bool rows_first) {
  return {heads * rows * columns, rows_first ? columns : rows * columns,
          rows_first ? heads * columns : columns};
}

MaskStrides mask_strides_of(const Descriptor& mask) {
  int64_t strides[4];
  int64_t stride = 1;
  for (int32_t axis = 3; axis >= 0; --axis) {
    strides[axis] = mask.dims[axis] == 1 ? 0 : stride;
    stride *= mask.dims[axis];
  }
  return {strides[0], strides[1], strides[2], strides[3]};
}

}  // namespace

bool accepts(Tensor tensor, int32_t type, int32_t q_type) {
  switch (tensor) {
    case kQ:
      return is(type, DType::kFloat16) || is(type, DType::kBFloat16) || is(type, DType::kFloat32);
    case kMask:
      return is(type, DType::kBool) || is(type, DType::kFloat32) || type == q_type;
    case kLengths:
    case kQStart:
      return type == kInt32;
    default:
      return type == q_type;
  }
}

void check_inputs(const Attributes& a, const Inputs& inputs) {
  const bool has_v = !a.has(kFeatureValuesInK);
  check_type(inputs, kQ);
  check_type(inputs, kK);
  check_rank(inputs, kQ, 4, a.rows_first() ? "(B, S, H, D)" : "(B, H, S, D)");
  check_rank(inputs, kK, 4, "(B, Hkv, T, D)");
  if (has_v) {
    check_type(inputs, kV);
    check_rank(inputs, kV, 4, "(B, Hkv, T, V)");
  }
  const Sizes n = sizes_of(a, inputs);
  check_size(inputs, kK, 0, "B", n.batch);
  check_size(inputs, kK, 3, "D", n.head_size);
  if (has_v) {
    check_size(inputs, kV, 0, "B", n.batch);
    check_size(inputs, kV, 1, "Hkv", n.kv_heads);
    check_size(inputs, kV, 2, "T", n.keys);
  }
  if (a.has(kFeatureMask)) {
    check_type(inputs, kMask);
    check_rank(inputs, kMask, 4, "(B, H, S, T), each dimension 1 or full");
    check_size(inputs, kMask, 0, "B", n.batch, /* broadcast = */ true);
    check_size(inputs, kMask, 1, "H", n.heads, /* broadcast = */ true);
    check_size(inputs, kMask, 2, "S", n.queries, /* broadcast = */ true);
    check_size(inputs, kMask, 3, "T", n.keys, /* broadcast = */ true);
  }
  const struct {
    Feature feature;
    Tensor tensor;
  } integers[] = {{kFeatureLengths, kLengths}, {kFeatureQStart, kQStart}};
  for (const auto& [feature, tensor] : integers) {
    if (!a.has(feature)) continue;
    check_type(inputs, tensor);
    check_rank(inputs, tensor, 1, "(B,)");
    check_size(inputs, tensor, 0, "B", n.batch);
  }
}

AttentionParams describe_call(const Attributes& a, const Inputs& inputs) {
  const Sizes n = sizes_of(a, inputs);
  AttentionParams call{};
  call.batch = to_int32("B", n.batch);
  call.heads = to_int32("H", n.heads);
  call.kv_heads = to_int32("Hkv", n.kv_heads);
  call.queries = to_int32("S", n.queries);
  call.keys = to_int32("T", n.keys);
  call.head_size = to_int32("D", n.head_size);
  call.v_head_size = to_int32("V", n.v_head_size);
  call.v = a.has(kFeatureValuesInK) ? nullptr : &kAnywhere;
  call.q_strides = strides_of(n.heads, n.queries, n.head_size, a.rows_first());
  call.k_strides = strides_of(n.kv_heads, n.keys, n.head_size, false);
  call.v_strides = strides_of(n.kv_heads, n.keys, n.v_head_size, false);
  call.y_strides = strides_of(n.heads, n.queries, n.v_head_size, a.rows_first());
  call.lse_strides = strides_of(n.heads, n.queries, 1, false);
  call.window_left = a.window_left;
  call.window_right = a.is_causal == 1 ? 0 : a.window_right;
  call.dtype = static_cast<DType>(inputs[kQ].type);
  call.softmax_precision = static_cast<DType>(a.softmax_precision);
  call.scale = a.scale;
  call.softcap = a.softcap;
  if (a.has(kFeatureMask)) {
    call.mask_dtype = static_cast<DType>(inputs[kMask].type);
    call.mask_strides = mask_strides_of(inputs[kMask]);
  }
  return call;
}

void set_inputs(const Attributes& a, const void* const* inputs, AttentionParams& call) {
  const auto live = [&](Feature feature, Tensor tensor) {
    return a.has(feature) ? inputs[tensor] : nullptr;
  };
  call.q = inputs[kQ];
  call.k = inputs[kK];
  call.v = a.has(kFeatureValuesInK) ? nullptr : inputs[kV];
  call.attn_mask = live(kFeatureMask, kMask);
  call.kv_lengths = static_cast<const int32_t*>(live(kFeatureLengths, kLengths));
  call.q_start = static_cast<const int32_t*>(live(kFeatureQStart, kQStart));
}

}  // namespace fastmqa::op
