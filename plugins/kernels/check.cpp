// SPDX-License-Identifier: MIT
#include "check.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <initializer_list>

namespace fastmqa {
namespace {

constexpr int kVectorBytes = 16;        // of every access to q, k, v and y
constexpr int64_t kMostRows = 1 << 30;  // row and key numbers, and blocks, are 32-bit

int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

struct Operand {
  const char* name;
  const void* pointer;
  const Strides& strides;
  int32_t heads;
  int32_t positions;
};

Status check_operand(const Operand& operand, const AttentionParams& a) {
  if (operand.pointer == nullptr)
    return failure(Code::kInvalid, "%s is a null pointer", operand.name);
  if (reinterpret_cast<uintptr_t>(operand.pointer) % kVectorBytes != 0) {
    return failure(Code::kInvalid, "%s at %p is not aligned to %d bytes; copy it to memory that is",
                   operand.name, operand.pointer, kVectorBytes);
  }
  const int multiple = kVectorBytes / bytes_of(a.dtype);
  const struct {
    const char* name;
    int64_t stride;
    int32_t size;
  } axes[] = {{"batch", operand.strides.batch, a.batch},
              {"head", operand.strides.head, operand.heads},
              {"row", operand.strides.row, operand.positions}};
  for (const auto& axis : axes) {
    if (axis.size > 1 && axis.stride % multiple != 0) {
      return failure(Code::kInvalid,
                     "%s has a %s stride of %lld elements; it must be a multiple of %d, so that "
                     "every row is aligned to %d bytes: make the tensor contiguous",
                     operand.name, axis.name, static_cast<long long>(axis.stride), multiple,
                     kVectorBytes);
    }
  }
  return ok();
}

}  // namespace

Status ok() { return {Code::kOk, ""}; }

Status failure(Code code, const char* format, ...) {
  Status status{code, ""};
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(status.text, sizeof status.text, format, arguments);
  va_end(arguments);
  return status;
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kNone:
      return "none";
    case DType::kFloat32:
      return "float32";
    case DType::kBool:
      return "bool";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
  }
  return "unknown";
}

Status check_sizes(const AttentionParams& a) {
  const struct {
    const char* name;
    int32_t size;
  } sizes[] = {{"B (batch)", a.batch},
               {"H (heads)", a.heads},
               {"Hkv (kv_heads)", a.kv_heads},
               {"S (queries)", a.queries},
               {"T (keys)", a.keys},
               {"D (head_size)", a.head_size},
               {"V (v_head_size)", a.v_head_size}};
  for (const auto& [name, size] : sizes) {
    if (size < 1) return failure(Code::kInvalid, "%s is %d; it must be at least 1", name, size);
  }
  if (a.heads % a.kv_heads != 0) {
    return failure(Code::kInvalid, "H=%d query heads are not a multiple of Hkv=%d", a.heads,
                   a.kv_heads);
  }
  for (const int32_t size : {a.head_size, a.v_head_size}) {
    if (size % 8 != 0) {
      return failure(Code::kUnsupported,
                     "head sizes D=%d, V=%d: both must be multiples of 8; pad the heads",
                     a.head_size, a.v_head_size);
    }
  }
  if (a.v == nullptr && a.v_head_size > a.head_size) {
    return failure(Code::kInvalid, "V=%d columns of k as values, of D=%d", a.v_head_size,
                   a.head_size);
  }
  const int64_t rows = int64_t{a.heads} * a.queries;
  if (a.keys > kMostRows || rows > kMostRows / a.batch) {
    return failure(Code::kUnsupported,
                   "B=%d, H=%d, S=%d, T=%d: at most 2^30 keys and B x H x S <= 2^30 rows are "
                   "numbered in 32 bits; split the batch",
                   a.batch, a.heads, a.queries, a.keys);
  }
  if (a.dtype != DType::kFloat16 && a.dtype != DType::kBFloat16 && a.dtype != DType::kFloat32) {
    return failure(Code::kUnsupported,
                   "dtype %d is none of float16 (10), bfloat16 (16), float32 (1)",
                   static_cast<int>(a.dtype));
  }
  if (a.mask_dtype != DType::kNone && a.mask_dtype != DType::kBool &&
      a.mask_dtype != DType::kFloat32 && a.mask_dtype != a.dtype) {
    return failure(Code::kUnsupported, "attn_mask is %s (%d); it may be bool, float32 or %s",
                   name_of(a.mask_dtype), static_cast<int>(a.mask_dtype), name_of(a.dtype));
  }
  if (a.softmax_precision != DType::kFloat32 &&
      !(a.softmax_precision == DType::kFloat16 && a.dtype == DType::kFloat16)) {
    return failure(Code::kUnsupported,
                   "softmax_precision %d with %s: it is 1 (float32), or 10 (float16) for float16",
                   static_cast<int>(a.softmax_precision), name_of(a.dtype));
  }
  if (a.window_left < -1 || a.window_right < -1) {
    return failure(Code::kInvalid, "window %d, %d: a number of keys >= 0, or -1 for unbounded",
                   a.window_left, a.window_right);
  }
  if (!std::isfinite(a.scale) || !std::isfinite(a.softcap) || a.softcap < 0) {
    return failure(Code::kInvalid, "scale %g, softcap %g: both must be finite, softcap >= 0",
                   static_cast<double>(a.scale), static_cast<double>(a.softcap));
  }
  return ok();
}

Status check_memory(const AttentionParams& a) {
  const Operand operands[] = {{"q", a.q, a.q_strides, a.heads, a.queries},
                              {"k", a.k, a.k_strides, a.kv_heads, a.keys},
                              {"v", a.v, a.v_strides, a.kv_heads, a.keys},
                              {"y", a.y, a.y_strides, a.heads, a.queries}};
  for (const Operand& operand : operands) {
    if (operand.pointer == nullptr && &operand.strides == &a.v_strides) continue;  // values in k
    if (const Status status = check_operand(operand, a); status.code != Code::kOk) return status;
  }
  if ((a.attn_mask == nullptr) != (a.mask_dtype == DType::kNone)) {
    return failure(Code::kInvalid, "attn_mask at %p with mask_dtype %s: give both or neither",
                   a.attn_mask, name_of(a.mask_dtype));
  }
  const int mask_bytes = a.mask_dtype == DType::kBool ? 1 : bytes_of(a.mask_dtype);
  const struct {
    const char* name;
    const void* pointer;
    int bytes;
  } others[] = {{"attn_mask", a.attn_mask, mask_bytes},
                {"kv_lengths", a.kv_lengths, 4},
                {"q_start", a.q_start, 4},
                {"lse", a.lse, 4},
                {"workspace", a.workspace, kVectorBytes}};
  for (const auto& [name, pointer, bytes] : others) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
      return failure(Code::kInvalid, "%s at %p is not aligned to %d bytes", name, pointer, bytes);
    }
  }
  return ok();
}

int32_t report(const Status& status, char* text, size_t text_bytes) {
  if (text != nullptr && text_bytes > 0) std::snprintf(text, text_bytes, "%s", status.text);
  return static_cast<int32_t>(status.code);
}

}  // namespace fastmqa
