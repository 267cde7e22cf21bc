// SPDX-License-Identifier: MIT
#include "plan.h"

#include <algorithm>
#include <vector>

namespace fastmqa {
namespace {

// Fewer tiles than this are not worth a second block and its part of the workspace.
constexpr int kLeastTilesOfSplit = 2;

// Memory is busy before all SMs are, and every part costs bytes. To be measured on a GPU.
constexpr double kEnoughUse = 0.8;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool covers(const Variant& variant, const AttentionParams& a, const Device& device) {
  const Tile& tile = variant.tile;
  const bool generation = variant.dtype == DType::kFloat32
                              ? variant.min_sm <= device.sm
                              : variant.min_sm == (device.sm >= kAmpere ? kAmpere : kTuring);
  // Values in k: those rows read k once for both, the others read it twice.
  return variant.dtype == a.dtype && generation && tile.head_size >= a.head_size &&
         tile.v_head_size >= a.v_head_size && (!tile.values_in_k || a.v == nullptr);
}

// Keys that one tile of rows may see at most.
int64_t visible_span(const AttentionParams& a, const Tile& tile, int group) {
  if (a.window_left < 0 || a.window_right < 0) return a.keys;
  const int64_t positions = divide_up(tile.block_rows, group) + 1;
  return std::min<int64_t>(a.keys,
                           int64_t{a.window_left} + a.window_right + positions + tile.block_keys);
}

// The smallest tile that holds all rows of a KV head, so that keys are read once. For more rows,
// the largest tile that gives every SM a block; where none does, the largest for a decode's few
// rows, whose keys can be split instead, and else the smallest but one.
int choose_tile(const std::vector<int>& candidates, int64_t rows, int64_t kv_heads, int sm_count) {
  const auto rows_of = [](int i) { return kVariants[i].tile.block_rows; };
  for (const int i : candidates) {
    if (rows <= rows_of(i)) return i;
  }
  for (auto i = candidates.rbegin(); i != candidates.rend(); ++i) {
    if (divide_up(rows, rows_of(*i)) * kv_heads >= sm_count) return *i;
  }
  if (rows <= 2 * rows_of(candidates.back())) return candidates.back();
  return candidates[candidates.size() > 1 ? 1 : 0];
}

}  // namespace

int choose_splits(int64_t blocks, int64_t slots, int key_tiles) {
  const int most = std::min(kMostSplits, key_tiles / kLeastTilesOfSplit);
  if (most < 2 || static_cast<double>(blocks) >= kEnoughUse * static_cast<double>(slots)) return 1;
  // Blocks run in waves of `slots`; the last one may leave places empty. Of the divisions that come
  // close to the best use, the one with the fewest parts.
  const auto use = [&](int splits) {
    const int64_t total = blocks * splits;
    return static_cast<double>(total) / static_cast<double>(divide_up(total, slots) * slots);
  };
  double best = 0;
  for (int splits = 1; splits <= most; ++splits) best = std::max(best, use(splits));
  int splits = 1;
  while (use(splits) < kEnoughUse * best) ++splits;
  return splits;
}

Plan make_plan(const AttentionParams& a, const Device& device,
               const std::array<int, kVariantCount>& shared_bytes) {
  const int group = a.heads / a.kv_heads;
  const int64_t rows = int64_t{a.queries} * group;  // of one KV head
  const int64_t kv_heads = int64_t{a.batch} * a.kv_heads;

  // Those of the smallest head sizes that will do, fewest rows first.
  std::vector<int> candidates;
  for (int i = 0; i < kVariantCount; ++i) {
    const Tile& tile = kVariants[i].tile;
    if (!covers(kVariants[i], a, device)) continue;
    if (shared_bytes[i] == 0 || shared_bytes[i] > device.shared_bytes) continue;
    if (!candidates.empty()) {
      const Tile& first = kVariants[candidates[0]].tile;
      if (tile.head_size != first.head_size || tile.v_head_size != first.v_head_size) break;
    }
    candidates.push_back(i);
  }
  if (candidates.empty()) return {-1, {}, 0, 0};
  const int chosen = choose_tile(candidates, rows, kv_heads, device.sm_count);

  const Tile& tile = kVariants[chosen].tile;
  const int64_t row_tiles = divide_up(rows, tile.block_rows);
  const int64_t blocks = row_tiles * kv_heads;
  const int64_t key_tiles = divide_up(visible_span(a, tile, group), tile.block_keys);
  const int splits = choose_splits(blocks, device.sm_count,
                                   static_cast<int>(std::min<int64_t>(key_tiles, 1 << 20)));

  Plan plan{chosen, {}, static_cast<unsigned>(blocks * splits), 0};
  plan.params.attention = a;
  plan.params.group = group;
  plan.params.row_tiles = static_cast<int32_t>(row_tiles);
  plan.params.splits = splits;
  plan.params.rows = static_cast<int32_t>(kv_heads * rows);
  if (splits > 1) {
    plan.combine_grid = static_cast<unsigned>(divide_up(kv_heads * rows, kCombineRows));
  }
  return plan;
}

}  // namespace fastmqa
