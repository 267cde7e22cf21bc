// SPDX-License-Identifier: MIT
//
// The support matrix: every combination of type, head sizes and tile that is compiled. Whatever
// asks "is this supported?" reads these rows.
#pragma once

#include <fastmqa/arch/policy.h>
#include <fastmqa/attention.h>

#include <array>
#include <cstddef>
#include <iterator>

namespace fastmqa {

// How one kernel divides its work. A block computes `block_rows` rows, each one (position, head) of
// the heads that share keys and values, and goes through the keys `block_keys` at a time.
struct Tile {
  int head_size;    // D that the kernel computes with; smaller ones are padded with zeros
  int v_head_size;  // V, likewise
  int block_rows;
  int block_keys;
  int warps_rows;    // warps side by side over the rows
  int warps_keys;    // and over the keys of a tile, then over the columns of V
  int stages;        // tiles of K and of V in shared memory
  bool values_in_k;  // V is the first columns of K, of which there is one copy

  constexpr bool operator==(const Tile&) const = default;
};

constexpr int threads_of(const Tile& tile) { return 32 * tile.warps_rows * tile.warps_keys; }

struct Variant {
  DType dtype;
  int min_sm;  // generation of the code: kTuring or kAmpere
  Tile tile;

  constexpr bool operator==(const Variant&) const = default;
};

// clang-format off: tables

// 64 KB of shared memory, no cp.async: one tile of K and V, the next one waits in registers.
inline constexpr Tile kTuringTiles[] = {
    //  D    V  rows keys warps stages
    {32, 32, 16, 64, 1, 4, 1, false},
    {32, 32, 64, 64, 4, 1, 1, false},
    {32, 32, 128, 64, 8, 1, 1, false},
    {32, 32, 128, 64, 4, 1, 1, false},
    {64, 64, 16, 64, 1, 4, 1, false},
    {64, 64, 64, 64, 4, 1, 1, false},
    {64, 64, 128, 64, 8, 1, 1, false},
    {64, 64, 128, 32, 4, 1, 1, false},
    {80, 80, 16, 64, 1, 4, 1, false},
    {80, 80, 64, 64, 4, 1, 1, false},
    {80, 80, 128, 64, 8, 1, 1, false},
    {80, 80, 128, 32, 4, 1, 1, false},
    {96, 96, 16, 64, 1, 4, 1, false},
    {96, 96, 64, 32, 4, 1, 1, false},
    {96, 96, 128, 64, 8, 1, 1, false},
    {96, 96, 128, 32, 4, 1, 1, false},
    {128, 128, 16, 64, 1, 4, 1, false},
    {128, 128, 64, 32, 4, 1, 1, false},
    {128, 128, 128, 32, 8, 1, 1, false},
    {128, 128, 128, 16, 4, 1, 1, false},
    {192, 128, 16, 64, 1, 4, 1, false},
    {192, 128, 64, 32, 4, 1, 1, false},
    {192, 192, 16, 64, 1, 4, 1, false},
    {192, 192, 64, 32, 4, 1, 1, false},
    {256, 256, 16, 32, 1, 4, 1, false},
    {256, 256, 64, 16, 4, 2, 1, false},
    {288, 256, 16, 64, 1, 4, 1, true},
    {288, 256, 64, 32, 4, 2, 1, true},
    {576, 512, 16, 32, 1, 4, 1, true},
};

// 99 KB on an A10 or L4 (a row that needs more runs on an A100 or H100 only), cp.async.
inline constexpr Tile kAmpereTiles[] = {
    {32, 32, 16, 64, 1, 4, 3, false},
    {32, 32, 64, 64, 4, 1, 2, false},
    {32, 32, 128, 64, 8, 1, 2, false},
    {32, 32, 128, 64, 4, 1, 2, false},
    {64, 64, 16, 64, 1, 4, 3, false},
    {64, 64, 64, 64, 4, 1, 2, false},
    {64, 64, 128, 64, 8, 1, 2, false},
    {64, 64, 128, 32, 4, 1, 3, false},
    {80, 80, 16, 64, 1, 4, 3, false},
    {80, 80, 64, 64, 4, 1, 2, false},
    {80, 80, 128, 64, 8, 1, 2, false},
    {80, 80, 128, 32, 4, 1, 2, false},
    {96, 96, 16, 64, 1, 4, 3, false},
    {96, 96, 64, 64, 4, 1, 2, false},
    {96, 96, 128, 64, 8, 1, 2, false},
    {96, 96, 128, 32, 4, 1, 2, false},
    {128, 128, 16, 64, 1, 4, 2, false},
    {128, 128, 64, 64, 4, 1, 2, false},
    {128, 128, 128, 64, 8, 1, 2, false},
    {128, 128, 128, 32, 4, 1, 2, false},
    {192, 128, 16, 64, 1, 4, 2, false},
    {192, 128, 64, 64, 4, 1, 1, false},
    {192, 192, 16, 64, 1, 4, 1, false},
    {192, 192, 64, 64, 4, 1, 1, false},
    {256, 256, 16, 64, 1, 4, 1, false},
    {256, 256, 64, 32, 4, 1, 1, false},
    {288, 256, 16, 64, 1, 4, 2, true},
    {288, 256, 64, 32, 4, 2, 2, true},
    {576, 512, 16, 32, 1, 4, 2, true},
    {576, 512, 32, 16, 2, 2, 2, true},
    {576, 512, 64, 32, 4, 2, 2, true},
};

// float32 multiplies on the CUDA cores: the reference on the device, for every SM.
inline constexpr Tile kFloat32Tiles[] = {
    {32, 32, 16, 32, 1, 4, 1, false},   {64, 64, 16, 32, 1, 4, 1, false},
    {80, 80, 16, 32, 1, 4, 1, false},   {96, 96, 16, 32, 1, 4, 1, false},
    {128, 128, 16, 32, 1, 4, 1, false}, {192, 192, 16, 32, 1, 4, 1, false},
    {256, 256, 64, 16, 4, 2, 1, false}, {288, 256, 16, 32, 1, 4, 1, true},
    {576, 512, 16, 16, 1, 4, 1, true},
};

// clang-format on

inline constexpr int kVariantCount =
    std::size(kTuringTiles) + 2 * std::size(kAmpereTiles) + std::size(kFloat32Tiles);

// Of one type, those of smaller head sizes come first, then those with fewer rows. Of 128 rows
// there are two: eight warps, of which those without rows rest, for a decode's heads; and four
// warps with twice the rows each, which read half as much from shared memory per product, for
// prefill.
inline constexpr auto kVariants = [] {
  std::array<Variant, kVariantCount> variants{};
  int count = 0;
  for (const Tile& tile : kTuringTiles) variants[count++] = {DType::kFloat16, kTuring, tile};
  for (const Tile& tile : kAmpereTiles) variants[count++] = {DType::kFloat16, kAmpere, tile};
  for (const Tile& tile : kAmpereTiles) variants[count++] = {DType::kBFloat16, kAmpere, tile};
  for (const Tile& tile : kFloat32Tiles) variants[count++] = {DType::kFloat32, kTuring, tile};
  return variants;
}();

}  // namespace fastmqa
