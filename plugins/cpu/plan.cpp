// SPDX-License-Identifier: MIT
#include "plan.h"

#include <algorithm>

namespace fastmqa::cpu {
namespace {

constexpr int32_t kFewRows = 96;     // that one unit takes whole
constexpr int32_t kRows = 64;        // of a unit, where the head sizes are large
constexpr int32_t kLargeHead = 512;  // D + V above which that is so: the operands shall fit L2

// A split costs a packing of q and a combination, about as much as 6 keys, and a few microseconds.
// It pays where it keeps a core busy, of which there are rarely more than kMostUnits.
constexpr int32_t kSplitKeys = 256;
constexpr int64_t kSplitProducts = 1 << 17;
constexpr int64_t kMostUnits = 32;

// Of a call, below which waking a thread costs more than it brings.
constexpr int64_t kFewProducts = 1 << 16;

constexpr size_t kAlignment = 64;  // bytes, of a cache line and of the widest vector

int32_t round_up(int32_t x, int32_t multiple) { return (x + multiple - 1) / multiple * multiple; }
int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Hands out consecutive aligned arrays of a piece of memory; counts only if that is null.
class Arrays {
 public:
  explicit Arrays(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    T* array = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return array;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

char* aligned(void* workspace) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(workspace);
  return reinterpret_cast<char*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

Scratch take_scratch(Arrays& arrays, const Plan& plan, const AttentionParams& a) {
  const int64_t rows = round_up(plan.block_rows, kMostLanes);
  const int64_t columns = round_up(a.head_size, kMostLanes);
  const int64_t scores =
      std::max(rows * kBlockKeys, std::min<int64_t>(rows, 2 * kMostLanes) * kFewRowsKeys);
  Scratch s;
  s.queries = arrays.take<float>(rows * columns);
  s.scores = arrays.take<float>(scores);
  s.mask = arrays.take<float>(a.mask_dtype == DType::kNone ? 0 : scores);
  s.keys = arrays.take<float>(columns * kBlockKeys);
  s.outputs = arrays.take<float>(rows * a.v_head_size);
  s.largest = arrays.take<float>(rows);
  s.sums = arrays.take<float>(rows);
  s.factors = arrays.take<float>(rows);
  s.begins = arrays.take<int32_t>(rows);
  s.ends = arrays.take<int32_t>(rows);
  s.mask_starts = arrays.take<int64_t>(rows);
  return s;
}

size_t scratch_bytes(const Plan& plan, const AttentionParams& a) {
  Arrays arrays(nullptr);
  take_scratch(arrays, plan, a);
  return arrays.bytes();
}

Partials take_partials(Arrays& arrays, const Plan& plan, const AttentionParams& a) {
  const int64_t rows = plan.splits == 1 ? 0 : plan.units * plan.block_rows;
  Partials p;
  p.outputs = arrays.take<float>(rows * a.v_head_size);
  p.largest = arrays.take<float>(rows);
  p.sums = arrays.take<float>(rows);
  return p;
}

size_t partials_bytes(const Plan& plan, const AttentionParams& a) {
  Arrays arrays(nullptr);
  take_partials(arrays, plan, a);
  return arrays.bytes();
}

}  // namespace

Plan make_plan(const AttentionParams& a) {
  Plan plan{};
  plan.group = a.heads / a.kv_heads;
  plan.rows = a.queries * plan.group;
  const int32_t most = a.head_size + a.v_head_size > kLargeHead ? kRows : kFewRows;
  plan.row_blocks = static_cast<int32_t>(ceil_div(plan.rows, most));
  plan.block_rows = static_cast<int32_t>(ceil_div(plan.rows, plan.row_blocks));
  if (plan.row_blocks > 1) plan.block_rows = round_up(plan.block_rows, kMostLanes);
  plan.row_blocks = static_cast<int32_t>(ceil_div(plan.rows, plan.block_rows));
  plan.blocks = int64_t{a.batch} * a.kv_heads * plan.row_blocks;

  const int64_t products = int64_t{plan.block_rows} * a.keys * (a.head_size + a.v_head_size);
  const int64_t splits = std::min(
      {int64_t{a.keys / kSplitKeys}, products / kSplitProducts, ceil_div(kMostUnits, plan.blocks)});
  plan.splits = static_cast<int32_t>(std::max<int64_t>(splits, 1));
  plan.units = plan.blocks * plan.splits;
  plan.is_small = products < kFewProducts / plan.blocks;
  return plan;
}

Unit unit_at(const Plan& plan, const AttentionParams& a, int64_t index) {
  Unit unit{};
  unit.split = static_cast<int32_t>(index % plan.splits);
  unit.block = index / plan.splits;
  const int64_t heads = int64_t{a.batch} * a.kv_heads;
  const int64_t head = unit.block % heads;
  const int32_t row_block = plan.row_blocks - 1 - static_cast<int32_t>(unit.block / heads);
  unit.batch = static_cast<int32_t>(head / a.kv_heads);
  unit.kv_head = static_cast<int32_t>(head % a.kv_heads);
  unit.first_row = row_block * plan.block_rows;
  unit.rows = std::min(plan.block_rows, plan.rows - unit.first_row);
  return unit;
}

Range visible_keys(const AttentionParams& a, int32_t batch, int32_t position) {
  const int64_t length =
      a.kv_lengths == nullptr ? a.keys : std::clamp(a.kv_lengths[batch], int32_t{0}, a.keys);
  const int64_t start = a.q_start == nullptr ? length - a.queries : a.q_start[batch];
  const int64_t at = start + position;
  const int64_t begin = a.window_left < 0 ? 0 : std::max<int64_t>(at - a.window_left, 0);
  const int64_t end = a.window_right < 0 ? length : std::min(at + a.window_right + 1, length);
  if (begin >= end) return {0, 0};
  return {static_cast<int32_t>(begin), static_cast<int32_t>(end)};
}

Range part_of(Range range, const Plan& plan, int32_t split) {
  const int32_t keys = range.end - range.begin;
  const int64_t steps = ceil_div(keys, kSplitStep);
  const auto bound = [&](int32_t i) {
    const int64_t step = steps * i / plan.splits;
    return range.begin + static_cast<int32_t>(std::min<int64_t>(step * kSplitStep, keys));
  };
  return {bound(split), bound(split + 1)};
}

size_t workspace_bytes(const Plan& plan, const AttentionParams& a, int32_t threads) {
  return kAlignment + partials_bytes(plan, a) + threads * scratch_bytes(plan, a);
}

Partials partials_of(const Plan& plan, const AttentionParams& a) {
  Arrays arrays(aligned(a.workspace));
  return take_partials(arrays, plan, a);
}

Scratch scratch_of(const Plan& plan, const AttentionParams& a, int32_t thread) {
  Arrays arrays(aligned(a.workspace) + partials_bytes(plan, a) + thread * scratch_bytes(plan, a));
  return take_scratch(arrays, plan, a);
}

}  // namespace fastmqa::cpu
