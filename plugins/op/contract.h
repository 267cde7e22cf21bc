// SPDX-License-Identifier: MIT
//
// fastmqa::FusedAttention, version 1, as fastmqa_export/config.py states it: names, numbers of
// inputs and outputs, attributes, and which of their values are refused.
#pragma once

#include <cstdint>

namespace fastmqa::op {

inline constexpr char kName[] = "FusedAttention";
inline constexpr char kDomain[] = "fastmqa";
inline constexpr int32_t kVersion = 1;

// Tensors of a node: its inputs, then its outputs.
enum Tensor : int32_t { kQ, kK, kV, kMask, kLengths, kQStart, kY, kLse };
inline constexpr int32_t kInputs = 6;
inline constexpr int32_t kOutputs = 2;

inline constexpr const char* kTensorNames[kInputs + kOutputs] = {
    "q", "k", "v", "attn_mask", "kv_lengths", "q_start", "y", "lse"};

// Bits of the attribute `features`: which inputs and outputs are live.
enum Feature : int32_t {
  kFeatureMask = 1,
  kFeatureLengths = 2,
  kFeatureQStart = 4,
  kFeatureValuesInK = 8,
  kFeatureLse = 16,
  kAllFeatures = 31,
};

struct Attributes {
  float scale = 0;
  int32_t is_causal = 0;
  int32_t window_left = -1;
  int32_t window_right = -1;
  float softcap = 0;
  int32_t softmax_precision = 1;
  int32_t v_head_size = 0;
  int32_t layout = 0;
  int32_t features = 0;

  bool has(Feature feature) const { return (features & feature) != 0; }
  bool rows_first() const { return layout == 1; }  // q and y are (B, S, H, ·)
};

// Throws Refusal if a value, or a combination, is one that version 1 refuses.
void check_attributes(const Attributes& attributes);

}  // namespace fastmqa::op
