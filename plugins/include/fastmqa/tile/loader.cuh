// SPDX-License-Identifier: MIT
#pragma once

#include <cuda_runtime.h>

#include <fastmqa/arch/ptx.cuh>
#include <fastmqa/tile/smem_tile.cuh>

namespace fastmqa::tile {

// A row of a matrix in global memory.
template <class Element>
struct SourceRow {
  const Element* begin;
  bool exists;  // if not, `begin` is not read
};

// Brings tiles from global memory, with as much time as possible between asking and having:
// issue() asks, commit() closes a group of issues, land() makes an earlier group's data visible to
// this thread (to the others after a barrier).
//
// With cp.async the data goes straight to the tile, and any number of groups may be under way.
// Without (SM75), issue() loads into registers and land() stores from them: one group at a time,
// and the tile must be free at land(), not at issue().
template <class Tile, int kThreads, bool kAsync>
class Loader {
 public:
  // Row r of the tile becomes the first `chunks` chunks of the SourceRow source(r), then zeros;
  // zeros altogether where that does not exist.
  template <class Source>
  __device__ __forceinline__ void issue(Tile& tile, int chunks, Source source) {
    Tile::template for_each_chunk<kThreads>([&](int slot, int row, int base, int offset) {
      const auto from_row = source(row);
      const auto* from = from_row.begin + (base + offset) * Tile::kPerChunk;
      const bool valid = from_row.exists && base + offset < chunks;
      if constexpr (kAsync) {
        ptx::cp_async_16(tile.chunk(row, base, offset), from, valid);
      } else {
        staged_[slot] = valid ? __ldg(reinterpret_cast<const uint4*>(from)) : uint4{0, 0, 0, 0};
      }
    });
  }

  __device__ __forceinline__ static void commit() {
    if constexpr (kAsync) ptx::cp_async_commit();
  }

  // kPending: how many groups have been committed since the one that is wanted.
  template <int kPending>
  __device__ __forceinline__ void land(Tile& tile) {
    if constexpr (kAsync) {
      ptx::cp_async_wait<kPending>();
    } else {
      Tile::template for_each_chunk<kThreads>([&](int slot, int row, int base, int offset) {
        ptx::store_shared_16(tile.chunk(row, base, offset), staged_[slot]);
      });
    }
  }

 private:
  uint4 staged_[kAsync ? 1 : Tile::template slots<kThreads>()];
};

}  // namespace fastmqa::tile
