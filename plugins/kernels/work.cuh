// SPDX-License-Identifier: MIT
#pragma once

#include <fastmqa/tile/mask.cuh>

#include "params.h"
#include "traits.cuh"

namespace fastmqa {

// What one block has to do: some rows of one KV head, and a part of the keys that they see.
//
// The rows of a KV head are its (position, head) pairs, position by position, so that all heads
// that share keys and values read them once, whatever their number: row = s group + head.
template <class Traits>
struct Work {
  int batch;
  int kv_head;
  int split;
  int first_row;
  int rows;  // in this tile, at most kBlockRows
  int group;
  int length;     // valid keys of this sequence
  int64_t start;  // position of its first query
  int window_left, window_right;
  tile::KeyRange keys;        // seen by some row
  tile::KeyRange common;      // seen by every row
  int first_tile, last_tile;  // of this split, in tiles of kBlockKeys keys; last not included

  __device__ explicit Work(const KernelParams& p) {
    const AttentionParams& a = p.attention;
    int index = static_cast<int>(blockIdx.x);
    // With causality later rows see more keys: the longest work starts first.
    const int row_tile = p.row_tiles - 1 - index % p.row_tiles;
    index /= p.row_tiles;
    split = index % p.splits;
    index /= p.splits;
    kv_head = index % a.kv_heads;
    batch = index / a.kv_heads;

    group = p.group;
    first_row = row_tile * Traits::kBlockRows;
    rows = min(Traits::kBlockRows, a.queries * group - first_row);

    length = a.kv_lengths == nullptr ? a.keys : max(0, min(a.kv_lengths[batch], a.keys));
    start = a.q_start == nullptr ? static_cast<int64_t>(length) - a.queries : a.q_start[batch];
    window_left = a.window_left;
    window_right = a.window_right;

    keys = seen_by_any(0, rows);
    common = {row_keys(rows - 1).begin, row_keys(0).end};

    const int begin = keys.begin / Traits::kBlockKeys;
    const int end = keys.empty() ? begin : (keys.end - 1) / Traits::kBlockKeys + 1;
    const auto bound = [&](int part) {
      return begin + static_cast<int>(static_cast<int64_t>(end - begin) * part / p.splits);
    };
    first_tile = bound(split);
    last_tile = bound(split + 1);
  }

  // Frees the registers that hold what was computed of rows.
  __device__ void forget_rows() { group = ptx::opaque(group); }

  __device__ int position(int row) const { return (first_row + row) / group; }
  __device__ int head(int row) const { return kv_head * group + (first_row + row) % group; }

  // The keys that a row of this tile sees, mask aside.
  __device__ tile::KeyRange row_keys(int row) const {
    return tile::visible_keys(start + position(row), length, window_left, window_right);
  }

  // The keys that some of the rows first .. first + count - 1 see: both ends of the range grow
  // with the position. Rows that this tile does not have see none.
  __device__ tile::KeyRange seen_by_any(int first, int count) const {
    if (first >= rows) return {0, 0};
    const int last = min(first + count, rows) - 1;
    const tile::KeyRange range{row_keys(first).begin, row_keys(last).end};
    return range.empty() ? tile::KeyRange{0, 0} : range;
  }
};

}  // namespace fastmqa
