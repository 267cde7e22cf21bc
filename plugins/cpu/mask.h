// SPDX-License-Identifier: MIT
//
// The op's attn_mask as what is added to scores, whatever its type and strides.
#pragma once

#include <fastmqa/attention.h>

#include <cstdint>

namespace fastmqa::cpu {

// Where a mask's number for a row and a key goes: at data[row row_stride + key key_stride].
struct MaskTile {
  float* data;
  int64_t row_stride;
  int64_t key_stride;
};

// Writes 0 or -inf for a bool mask, otherwise its numbers, of `rows` rows whose first elements are
// `starts` elements from attn_mask, and `keys` keys from first_key on.
void fill_mask(const AttentionParams& params, const int64_t* starts, int32_t rows,
               int32_t first_key, int32_t keys, MaskTile tile);

}  // namespace fastmqa::cpu
