// SPDX-License-Identifier: MIT
//
// Where a tile's 16-byte chunks lie in shared memory so that no access meets a bank conflict.
// Pure arithmetic, tested on the host (tests/kernels).
#pragma once

namespace fastmqa::tile {

constexpr int kChunkBytes = 16;
constexpr int kPanelChunks = 8;  // 128 bytes: all 32 banks

// A tile of kRows rows of kChunks chunks is cut into panels of 8 chunks, and one of 4 or 2 for the
// rest. A panel is stored row by row; within a row, the chunks change places by an exclusive or
// with the row. So 8 threads that write 8 neighbouring chunks, and 8 that read one chunk column of
// 8 neighbouring rows (a matrix of ldmatrix), both touch every bank once.
//
// The chunk is base + offset, of which `base` alone decides the panel: threads of one access differ
// in `offset`, and where base is a constant, so is the panel. Returns the place in chunks.
template <int kRows, int kChunks>
constexpr int swizzled_chunk(int row, int base, int offset = 0) {
  constexpr int kRest = kChunks % kPanelChunks;
  constexpr int kWhole = kChunks - kRest;
  static_assert(kRest == 0 || kRest == 2 || kRest == 4, "a panel has 8, 4 or 2 chunks");
  if (kRest == 0 || base < kWhole) {
    const int panel = base / kPanelChunks * kPanelChunks * kRows;
    return panel + row * kPanelChunks + ((base % kPanelChunks + offset) ^ (row % kPanelChunks));
  }
  constexpr int kWidth = kRest == 0 ? 1 : kRest;
  return kWhole * kRows + row * kWidth +
         ((base - kWhole + offset) ^ (row / (kPanelChunks / kWidth) % kWidth));
}

}  // namespace fastmqa::tile
