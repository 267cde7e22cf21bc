// SPDX-License-Identifier: MIT
#pragma once

#include <fastmqa/attention.h>

namespace fastmqa {

// What the kernels get, by value: the caller's arguments and how the work was divided.
struct KernelParams {
  AttentionParams attention;
  int32_t group;      // H / Hkv, the heads that share keys and values
  int32_t row_tiles;  // tiles of (position, head) rows of one KV head
  int32_t splits;     // parts that each tile's keys are divided into
  int32_t rows;       // B H S
};

constexpr int kCombineRows = 4;   // rows of one block of the combine kernel
constexpr int kMostSplits = 128;  // a multiple of 32: its lanes share them

// With more than one split, the workspace holds each split's outputs, in the type of y and already
// divided by their sums (splits, B Hkv, S group, V), then the float32 logs of the sums (splits, B
// Hkv, S group). Outputs of 16 bits cost a rounding, and half of the bytes that splitting adds.
constexpr size_t partial_outputs_bytes(const KernelParams& p) {
  const size_t element_bytes = p.attention.dtype == DType::kFloat32 ? 4 : 2;
  return element_bytes * static_cast<size_t>(p.splits) * static_cast<size_t>(p.rows) *
         static_cast<size_t>(p.attention.v_head_size);
}
constexpr size_t partials_bytes(const KernelParams& p) {
  return partial_outputs_bytes(p) +
         sizeof(float) * static_cast<size_t>(p.splits) * static_cast<size_t>(p.rows);
}

}  // namespace fastmqa
