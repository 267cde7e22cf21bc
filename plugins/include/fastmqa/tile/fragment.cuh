// SPDX-License-Identifier: MIT
//
// How a warp holds matrices in registers. An accumulator fragment is 16 rows x 8 columns, four
// float32 values per lane: value i lies at row lane / 4 + 8 (i / 2), column 2 (lane % 4) + i % 2.
#pragma once

#include <cstring>
#include <fastmqa/arch/ptx.cuh>
#include <fastmqa/tile/smem_tile.cuh>

namespace fastmqa::tile {

constexpr int kFragmentRows = 16;
constexpr int kFragmentColumns = 8;
constexpr int kFragmentDepth = 16;  // columns of the left operand

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int fragment_row(int lane, int half) { return lane / 4 + 8 * half; }
__device__ __forceinline__ int fragment_column(int lane) { return 2 * (lane % 4); }

// The left operand (16 x 16) at (row, column) of a tile.
template <class Tile>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], const Tile& tile, int row, int column) {
  const int lane = lane_id();
  ptx::ldmatrix_x4(a, tile.chunk(row + lane % 16, column / Tile::kPerChunk, lane / 16));
}

// Right operands (16 x 8 each) whose *columns* are rows of the tile: row .. row + 15 from `column`
// on, so b[0], b[1] belong to the first 8 rows and b[2], b[3] to the others.
template <class Tile>
__device__ __forceinline__ void load_right_pair(uint32_t (&b)[4], const Tile& tile, int row,
                                                int column) {
  const int lane = lane_id();
  ptx::ldmatrix_x4(
      b, tile.chunk(row + lane % 8 + lane / 16 * 8, column / Tile::kPerChunk, lane / 8 % 2));
}

template <class Tile>
__device__ __forceinline__ void load_right(uint32_t (&b)[2], const Tile& tile, int row,
                                           int column) {
  const int lane = lane_id() % 16;  // of the others, the address is not used
  ptx::ldmatrix_x2(b, tile.chunk(row + lane % 8, column / Tile::kPerChunk, lane / 8));
}

// Right operands (16 x 8 each) whose rows are rows of the tile: row .. row + 15, and columns
// `column` .. + 7 in b[0], b[1], + 8 .. + 15 in b[2], b[3].
template <class Tile>
__device__ __forceinline__ void load_right_pair_transposed(uint32_t (&b)[4], const Tile& tile,
                                                           int row, int column) {
  const int lane = lane_id();
  ptx::ldmatrix_x4_trans(b, tile.at(row + lane % 16, column + lane / 16 * Tile::kPerChunk));
}

template <class Tile>
__device__ __forceinline__ void load_right_transposed(uint32_t (&b)[2], const Tile& tile, int row,
                                                      int column) {
  const int lane = lane_id() % 16;
  ptx::ldmatrix_x2_trans(b, tile.at(row + lane, column));
}

// Two values as one register of an operand, the first in the lower half.
__device__ __forceinline__ uint32_t pack(float first, float second, __half) {
  const __half2 pair = __floats2half2_rn(first, second);
  uint32_t bits;
  std::memcpy(&bits, &pair, sizeof bits);
  return bits;
}
__device__ __forceinline__ uint32_t pack(float first, float second, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  uint32_t bits;
  std::memcpy(&bits, &pair, sizeof bits);
  return bits;
}

}  // namespace fastmqa::tile
