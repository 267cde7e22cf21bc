// SPDX-License-Identifier: MIT
//
// attention.h in a few loops over float32 in host memory, to see that Python describes a call to
// the library as the header means it. It shares nothing with the kernels but that header.
#include <fastmqa/attention.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

using fastmqa::AttentionParams;
using fastmqa::Device;
using fastmqa::DType;

namespace {

constexpr size_t kWorkspaceBytes = 48;

int32_t answer(int32_t code, const char* message, char* text, size_t text_bytes) {
  std::snprintf(text, text_bytes, "%s", message);
  return code;
}

void attend(const AttentionParams& p, int64_t b, int64_t h, int64_t s) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const int64_t g = h / (p.heads / p.kv_heads);
  const auto* q = static_cast<const float*>(p.q) + b * p.q_strides.batch + h * p.q_strides.head +
                  s * p.q_strides.row;
  const auto* k = static_cast<const float*>(p.k) + b * p.k_strides.batch + g * p.k_strides.head;
  const auto& v_strides = p.v != nullptr ? p.v_strides : p.k_strides;
  const auto* v = static_cast<const float*>(p.v != nullptr ? p.v : p.k) + b * v_strides.batch +
                  g * v_strides.head;
  const int64_t mask_at =
      b * p.mask_strides.batch + h * p.mask_strides.head + s * p.mask_strides.row;

  const int64_t length = p.kv_lengths ? std::clamp(p.kv_lengths[b], 0, p.keys) : p.keys;
  const int64_t position = (p.q_start ? p.q_start[b] : length - p.queries) + s;
  double sum = 0, largest = -kInfinity;
  std::vector<double> scores(static_cast<size_t>(p.keys), -kInfinity);
  for (int64_t t = 0; t < length; ++t) {
    if (p.window_left >= 0 && t < position - p.window_left) continue;
    if (p.window_right >= 0 && t > position + p.window_right) continue;
    double x = 0;
    for (int64_t d = 0; d < p.head_size; ++d) {
      x += static_cast<double>(q[d]) * static_cast<double>(k[t * p.k_strides.row + d]);
    }
    x *= static_cast<double>(p.scale);
    if (p.softcap > 0) x = static_cast<double>(p.softcap) * std::tanh(x / p.softcap);
    const int64_t element = mask_at + t * p.mask_strides.key;
    if (p.mask_dtype == DType::kBool) {
      if (!static_cast<const bool*>(p.attn_mask)[element]) continue;
    } else if (p.mask_dtype == DType::kFloat32) {
      x += static_cast<const float*>(p.attn_mask)[element];
    }
    scores[static_cast<size_t>(t)] = x;
    largest = std::max(largest, x);
  }
  auto* y =
      static_cast<float*>(p.y) + b * p.y_strides.batch + h * p.y_strides.head + s * p.y_strides.row;
  std::vector<double> total(static_cast<size_t>(p.v_head_size));
  for (int64_t t = 0; t < length; ++t) {
    const double x = scores[static_cast<size_t>(t)];
    if (x == -kInfinity) continue;
    sum += std::exp(x - largest);
    for (int64_t c = 0; c < p.v_head_size; ++c) {
      total[static_cast<size_t>(c)] += std::exp(x - largest) * v[t * v_strides.row + c];
    }
  }
  for (int64_t c = 0; c < p.v_head_size; ++c) {
    y[c] = sum == 0 ? 0 : static_cast<float>(total[static_cast<size_t>(c)] / sum);
  }
  if (p.lse != nullptr) {
    p.lse[b * p.lse_strides.batch + h * p.lse_strides.head + s * p.lse_strides.row] =
        static_cast<float>(sum == 0 ? -kInfinity : largest + std::log(sum));
  }
}

}  // namespace

int32_t fastmqa_supports(const AttentionParams* p, const Device*, char* text, size_t text_bytes) {
  if (p->dtype == DType::kFloat32) return 0;
  return answer(2, "only float32", text, text_bytes);
}

size_t fastmqa_workspace_bytes(const AttentionParams*, const Device*, int32_t) {
  return kWorkspaceBytes;
}

size_t fastmqa_workspace_bound(const AttentionParams*, const Device*) { return kWorkspaceBytes; }

// Fails as a launch does on any stream but the default one.
int32_t fastmqa_run(const AttentionParams* p, const Device* device, int32_t, void* stream,
                    char* text, size_t text_bytes) {
  if (const int32_t code = fastmqa_supports(p, device, text, text_bytes)) return code;
  if (stream != nullptr) return answer(3, "launch: out of order", text, text_bytes);
  std::fill_n(static_cast<char*>(p->workspace), kWorkspaceBytes, '\0');
  for (int64_t b = 0; b < p->batch; ++b) {
    for (int64_t h = 0; h < p->heads; ++h) {
      for (int64_t s = 0; s < p->queries; ++s) attend(*p, b, h, s);
    }
  }
  return 0;
}

int32_t fastmqa_query_device(int32_t ordinal, Device* device, char* text, size_t text_bytes) {
  if (ordinal > 3) return answer(3, "invalid device ordinal", text, text_bytes);
  *device = {75, 40 + ordinal, 64 << 10};
  return 0;
}

size_t fastmqa_describe_launches(const AttentionParams* p, const Device*, int32_t, char* json,
                                 size_t json_bytes) {
  const char* text = p->dtype == DType::kFloat32 ? "{\"launches\": []}"
                                                 : "{\"code\": 2, \"error\": \"only float32\"}";
  return static_cast<size_t>(std::snprintf(json, json_bytes, "%s", text)) + 1;
}

size_t fastmqa_describe_variants(char* json, size_t json_bytes) {
  const char* text = "[{\"min_sm\": 75}, {\"min_sm\": 80}]";
  return static_cast<size_t>(std::snprintf(json, json_bytes, "%s", text)) + 1;
}
