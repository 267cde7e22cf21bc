// SPDX-License-Identifier: MIT
#include "describe.h"

#include <cstddef>
#include <cstdio>
#include <cstring>
#include <set>
#include <utility>

namespace fastmqa {
namespace {

// Where the kernels' parameters hold device addresses.
constexpr struct {
  const char* tensor;
  size_t offset;
} kPointers[] = {
    {"q", offsetof(KernelParams, attention.q)},
    {"k", offsetof(KernelParams, attention.k)},
    {"v", offsetof(KernelParams, attention.v)},
    {"attn_mask", offsetof(KernelParams, attention.attn_mask)},
    {"kv_lengths", offsetof(KernelParams, attention.kv_lengths)},
    {"q_start", offsetof(KernelParams, attention.q_start)},
    {"y", offsetof(KernelParams, attention.y)},
    {"lse", offsetof(KernelParams, attention.lse)},
    {"workspace", offsetof(KernelParams, attention.workspace)},
};

std::string number(int64_t value) { return std::to_string(value); }

// No text of ours holds control characters.
std::string quoted(const char* text) {
  std::string result = "\"";
  for (; *text != '\0'; ++text) {
    if (*text == '"' || *text == '\\') result += '\\';
    result += *text;
  }
  return result + "\"";
}

std::string hex(const void* bytes, size_t count) {
  std::string result;
  for (size_t i = 0; i < count; ++i) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", static_cast<const unsigned char*>(bytes)[i]);
    result += digits;
  }
  return result;
}

std::string describe_variant(int index, const Registry& registry) {
  const auto& [dtype, min_sm, tile] = kVariants[index];
  return "{\"index\": " + number(index) + ", \"dtype\": " + quoted(name_of(dtype)) +
         ", \"min_sm\": " + number(min_sm) + ", \"head_size\": " + number(tile.head_size) +
         ", \"v_head_size\": " + number(tile.v_head_size) +
         ", \"values_in_k\": " + (tile.values_in_k ? "true" : "false") +
         ", \"block_rows\": " + number(tile.block_rows) +
         ", \"block_keys\": " + number(tile.block_keys) +
         ", \"warps_rows\": " + number(tile.warps_rows) +
         ", \"warps_keys\": " + number(tile.warps_keys) + ", \"stages\": " + number(tile.stages) +
         ", \"shared_bytes\": " + number(registry.shared_bytes[index]) + "}";
}

std::string describe_launch(const char* kernel, unsigned grid, int block, int shared_bytes,
                            const KernelParams& params) {
  KernelParams blank = params;
  std::string pointers;
  for (const auto& [tensor, offset] : kPointers) {
    auto* place = reinterpret_cast<unsigned char*>(&blank) + offset;
    const void* address;
    std::memcpy(&address, place, sizeof address);
    // The caller need not have a workspace before it knows the size.
    const bool wants_workspace = params.splits > 1 && std::strcmp(tensor, "workspace") == 0;
    if (address == nullptr && !wants_workspace) continue;
    std::memset(place, 0, sizeof address);
    // Values in k that are read a second time are k's.
    const bool is_k = address == params.attention.k && std::string(tensor) == "v";
    pointers += (pointers.empty() ? "" : ", ") +
                quoted(number(static_cast<int64_t>(offset)).c_str()) + ": " +
                quoted(is_k ? "k" : tensor);
  }
  return "{\"kernel\": " + quoted(kernel) + ", \"grid\": " + number(grid) +
         ", \"block\": " + number(block) + ", \"shared_bytes\": " + number(shared_bytes) +
         ", \"params\": [{\"hex\": " + quoted(hex(&blank, sizeof blank).c_str()) +
         ", \"pointers\": {" + pointers + "}}]}";
}

}  // namespace

Status no_variant(const AttentionParams& a, const Device& device, const Registry& registry) {
  std::string sizes;
  std::set<std::pair<int, int>> seen;
  for (int i = 0; i < kVariantCount; ++i) {
    const Variant& variant = kVariants[i];
    if (variant.dtype != a.dtype || variant.min_sm > device.sm || registry.shared_bytes[i] == 0 ||
        registry.shared_bytes[i] > device.shared_bytes ||
        !seen.insert({variant.tile.head_size, variant.tile.v_head_size}).second) {
      continue;
    }
    sizes += (sizes.empty() ? "" : ", ") + number(variant.tile.head_size) + "/" +
             number(variant.tile.v_head_size) + (variant.tile.values_in_k ? " (values in k)" : "");
  }
  if (sizes.empty()) sizes = "none (bfloat16 needs SM80)";
  return failure(
      Code::kUnsupported,
      "%s with head sizes D=%d, V=%d%s is not built for SM%d with %d KB of shared memory; "
      "built for %s there, D/V: %s; smaller sizes run in the next larger",
      name_of(a.dtype), a.head_size, a.v_head_size, a.v == nullptr ? " (values in k)" : "",
      device.sm, device.shared_bytes >> 10, name_of(a.dtype), sizes.c_str());
}

std::string describe(const Status& status, const Plan& plan, const Registry& registry) {
  if (status.code != Code::kOk) {
    return "{\"code\": " + number(static_cast<int>(status.code)) +
           ", \"error\": " + quoted(status.text) + "}";
  }
  std::string launches =
      describe_launch("attention", plan.grid, threads_of(kVariants[plan.variant].tile),
                      registry.shared_bytes[plan.variant], plan.params);
  if (plan.combine_grid > 0) {
    launches +=
        ", " + describe_launch("combine", plan.combine_grid, 32 * kCombineRows, 0, plan.params);
  }
  return "{\"variant\": " + describe_variant(plan.variant, registry) +
         ", \"splits\": " + number(plan.params.splits) + ", \"workspace_bytes\": " +
         number(plan.combine_grid > 0 ? static_cast<int64_t>(partials_bytes(plan.params)) : 0) +
         ", \"launches\": [" + launches + "]}";
}

std::string describe_variants(const Registry& registry) {
  std::string rows;
  for (int i = 0; i < kVariantCount; ++i) {
    if (registry.shared_bytes[i] != 0) {
      rows += (rows.empty() ? "" : ",\n ") + describe_variant(i, registry);
    }
  }
  return "[" + rows + "]";
}

}  // namespace fastmqa
