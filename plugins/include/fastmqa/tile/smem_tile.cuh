// SPDX-License-Identifier: MIT
#pragma once

#include <cuda_runtime.h>
#include <fastmqa/tile/swizzle.h>

#include <fastmqa/arch/ptx.cuh>

namespace fastmqa::tile {

// A matrix (kRows, kColumns) in shared memory, swizzled.
template <class Element, int kRowCount, int kColumnCount>
struct SmemTile {
  using Value = Element;
  static constexpr int kRows = kRowCount;
  static constexpr int kColumns = kColumnCount;
  static constexpr int kPerChunk = kChunkBytes / static_cast<int>(sizeof(Element));
  static constexpr int kChunks = kColumns / kPerChunk;

  alignas(128) Element data[kRows * kColumns];

  __device__ __forceinline__ Element* chunk(int row, int base, int offset = 0) {
    return data + swizzled_chunk<kRows, kChunks>(row, base, offset) * kPerChunk;
  }
  __device__ __forceinline__ const Element* chunk(int row, int base, int offset = 0) const {
    return data + swizzled_chunk<kRows, kChunks>(row, base, offset) * kPerChunk;
  }
  __device__ __forceinline__ Element* at(int row, int column) {
    return chunk(row, column / kPerChunk / 2 * 2, column / kPerChunk % 2) + column % kPerChunk;
  }
  __device__ __forceinline__ const Element* at(int row, int column) const {
    return chunk(row, column / kPerChunk / 2 * 2, column / kPerChunk % 2) + column % kPerChunk;
  }

  // How many chunks each of kThreads threads gets from for_each_chunk(), at most.
  template <int kThreads>
  static constexpr int slots() {
    int count = 0;
    for (int base = 0; base < kChunks; base += kPanelChunks) {
      count += (kRows * width(base) + kThreads - 1) / kThreads;
    }
    return count;
  }

  // Calls f(slot, row, base, offset) for this thread's chunks, row by row. Neighbouring threads
  // get neighbouring chunks of a panel's row: 128 contiguous bytes of global memory per 8 threads.
  template <int kThreads, class Function>
  __device__ __forceinline__ static void for_each_chunk(Function f) {
    constexpr int kRest = kChunks % kPanelChunks;
    constexpr int kPanels = kChunks / kPanelChunks;
    const int thread = ptx::opaque(static_cast<int>(threadIdx.x));  // or addresses fill registers
    int slot = 0;
    if constexpr (kPanels > 0) slot = visit<kThreads, kPanelChunks, kPanels>(f, thread, 0, slot);
    if constexpr (kRest > 0) visit<kThreads, kRest, 1>(f, thread, kPanels * kPanelChunks, slot);
  }

 private:
  // The panels of kWidth chunks from chunk `first` on; returns the next slot. Rows that a thread
  // visits are a multiple of 8 apart: the swizzle is the same for all of them.
  template <int kThreads, int kWidth, int kPanels, class Function>
  __device__ __forceinline__ static int visit(Function& f, int thread, int first, int slot) {
    constexpr int kStep = kThreads / kWidth;
    const int row = thread / kWidth, chunk = thread % kWidth;
#pragma unroll
    for (int rows = 0; rows < kRows; rows += kStep) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel, ++slot) {
        if (kRows % kStep == 0 || row + rows < kRows) {
          f(slot, row + rows, first + panel * kPanelChunks, chunk);
        }
      }
    }
    return slot;
  }

  // Chunks in the panel that starts at `base`.
  static constexpr int width(int base) {
    return kChunks - base < kPanelChunks ? kChunks - base : kPanelChunks;
  }
};

// Takes the place of a tile that a variant does without.
struct NoTile {};

}  // namespace fastmqa::tile
