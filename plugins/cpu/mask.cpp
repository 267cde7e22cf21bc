// SPDX-License-Identifier: MIT
#include "mask.h"

#include <bit>
#include <cmath>
#include <limits>

namespace fastmqa::cpu {
namespace {

struct Bool {
  uint8_t bits;
  operator float() const { return bits != 0 ? 0.0f : -std::numeric_limits<float>::infinity(); }
};

struct BFloat16 {
  uint16_t bits;
  operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};

struct Float16 {
  uint16_t bits;
  operator float() const {
    // Normal numbers need another bias of the exponent; what that makes of the others is corrected
    // by arithmetic: subnormal ones have a leading 1 too many, infinity and NaN the wrong exponent.
    const uint32_t magnitude = uint32_t{bits} << 13 & 0x0fffe000;
    float x = std::bit_cast<float>(magnitude + (112u << 23));
    if ((bits & 0x7c00) == 0) x = std::bit_cast<float>(magnitude + (113u << 23)) - 0x1p-14f;
    if ((bits & 0x7c00) == 0x7c00) x = std::bit_cast<float>(magnitude | 0x7f800000);
    return std::copysign(x, bits & 0x8000 ? -1.0f : 1.0f);
  }
};

template <typename T>
void fill(const AttentionParams& a, const int64_t* starts, int32_t rows, int32_t first_key,
          int32_t keys, MaskTile tile) {
  const T* const mask = static_cast<const T*>(a.attn_mask) + first_key * a.mask_strides.key;
  for (int32_t row = 0; row < rows; ++row) {
    float* to = tile.data + row * tile.row_stride;
    // Heads mostly share a mask, and packed rows of one position lie side by side.
    const bool is_same = row > 0 && starts[row] == starts[row - 1];
    const float* const other = to - tile.row_stride;
    const T* from = mask + starts[row];
    for (int32_t key = 0; key < keys; ++key) {
      const int64_t at = key * tile.key_stride;
      to[at] = is_same ? other[at] : static_cast<float>(from[key * a.mask_strides.key]);
    }
  }
}

}  // namespace

void fill_mask(const AttentionParams& a, const int64_t* starts, int32_t rows, int32_t first_key,
               int32_t keys, MaskTile tile) {
  switch (a.mask_dtype) {
    case DType::kBool:
      return fill<Bool>(a, starts, rows, first_key, keys, tile);
    case DType::kFloat32:
      return fill<float>(a, starts, rows, first_key, keys, tile);
    case DType::kFloat16:
      return fill<Float16>(a, starts, rows, first_key, keys, tile);
    case DType::kBFloat16:
      return fill<BFloat16>(a, starts, rows, first_key, keys, tile);
    case DType::kNone:
      return;
  }
}

}  // namespace fastmqa::cpu
