// SPDX-License-Identifier: MIT
//
// How a call is divided into units of work, and where a unit's scratch memory lies. It depends on
// the sizes alone: not on the threads, so that any number of them gives the same bits.
#pragma once

#include <fastmqa/attention.h>

#include <cstddef>
#include <cstdint>

namespace fastmqa::cpu {

// Keys that are multiplied at once: a multiple of every register tile's keys, so that K's rows can
// be read where they are; 96 rows of 128 float32 are 48 KB, which L2 holds beside the other
// operands.
constexpr int32_t kBlockKeys = 96;

// The same of a unit whose rows do not fill lanes, of which there are fewer than kMostLanes * 2: K
// and V take turns less often, since what they are read from likes long runs.
constexpr int32_t kFewRowsKeys = 4 * kBlockKeys;

// Keys that splits are cut in, a multiple of all register tiles too; and those of the largest tile.
constexpr int32_t kSplitStep = kBlockKeys / 2;
constexpr int32_t kMostTileKeys = 16;

constexpr int32_t kMostLanes = 16;  // of float32 in a vector

// The rows of one KV head are its (position, head) pairs, position by position.
struct Plan {
  int32_t group;       // H / Hkv, the heads that share keys and values
  int32_t rows;        // S group
  int32_t block_rows;  // rows of a unit, at most
  int32_t row_blocks;  // of one KV head
  int32_t splits;      // parts that each row block's keys are divided into
  int64_t blocks;      // B Hkv row_blocks
  int64_t units;       // blocks splits
  bool is_small;       // other threads would cost more than they bring
};

Plan make_plan(const AttentionParams& params);

// Rows [first_row, first_row + rows) of one KV head, and which part of their keys.
struct Unit {
  int64_t block;
  int32_t split;
  int32_t batch;
  int32_t kv_head;
  int32_t first_row;
  int32_t rows;
  // Computed by the same thread right after the split before it: has its queries in scratch memory
  // and its first keys in a cache.
  bool follows;
};

// Units with the most keys come first where causality makes them differ.
Unit unit_at(const Plan& plan, const AttentionParams& params, int64_t index);

// Keys [begin, end); begin = end if there is none.
struct Range {
  int32_t begin;
  int32_t end;
};

// The keys that causality, windows and lengths leave to the query at `position` of [0, S).
Range visible_keys(const AttentionParams& params, int32_t batch, int32_t position);

// The part of `range` that a split reads.
Range part_of(Range range, const Plan& plan, int32_t split);

// What a unit computes with. Arrays over rows are padded to whole vectors; sizes are in plan.cpp.
struct Scratch {
  float* queries;        // the unit's rows of q times scale, as the product with K reads them
  float* scores;         // of a panel of rows and a block of keys, then its exponentials
  float* mask;           // of the same
  float* keys;           // a block of K in float32
  float* outputs;        // (rows, V), not yet divided by the sums
  float* largest;        // scores so far, by row
  float* sums;           // of exponentials, by row
  float* factors;        // what a larger score makes of earlier outputs, by row
  int32_t* begins;       // first visible key, by row
  int32_t* ends;         // the key after the last, by row
  int64_t* mask_starts;  // first element of the mask, by row
};

// What splits leave for the combination: (blocks, splits, block_rows) rows.
struct Partials {
  float* outputs;  // of V columns
  float* largest;
  float* sums;
};

size_t workspace_bytes(const Plan& plan, const AttentionParams& params, int32_t threads);
Scratch scratch_of(const Plan& plan, const AttentionParams& params, int32_t thread);
Partials partials_of(const Plan& plan, const AttentionParams& params);

}  // namespace fastmqa::cpu
