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

// What a tactic changes in the planner's choice: the tile, in steps to fewer (-1) or more rows, and
// how many blocks per SM the splits are to make; 0: none.
struct Tactic {
  int tile_step;
  double blocks_per_sm;
};
constexpr Tactic kTacticTable[kTactics + 1] = {{0, 1},    // the planner's own
                                               {0, 0},    // no splits: fewest bytes
                                               {0, 0.5},  // half of the SMs may fill the bus
                                               {0, 2},    // two blocks may hide more latency
                                               {-1, 1},  {1, 1}};
constexpr int kMostBlocksPerSm = 2;  // of the table

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
  const auto rows_of = [&](int i) { return kVariants[candidates[i]].tile.block_rows; };
  const int last = static_cast<int>(candidates.size()) - 1;
  for (int i = 0; i <= last; ++i) {
    if (rows <= rows_of(i)) return i;
  }
  for (int i = last; i >= 0; --i) {
    if (divide_up(rows, rows_of(i)) * kv_heads >= sm_count) return i;
  }
  if (rows <= 2 * rows_of(last)) return last;
  return std::min(1, last);
}

// Those that cover the call, of the smallest head sizes that will do, fewest rows first.
std::vector<int> candidates_for(const AttentionParams& a, const Device& device,
                                const std::array<int, kVariantCount>& shared_bytes) {
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
  return candidates;
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
               const std::array<int, kVariantCount>& shared_bytes, int tactic) {
  const int group = a.heads / a.kv_heads;
  const int64_t rows = int64_t{a.queries} * group;  // of one KV head
  const int64_t kv_heads = int64_t{a.batch} * a.kv_heads;

  const std::vector<int> candidates = candidates_for(a, device, shared_bytes);
  if (candidates.empty()) return {-1, {}, 0, 0};
  const int place =
      choose_tile(candidates, rows, kv_heads, device.sm_count) + kTacticTable[tactic].tile_step;
  const int chosen = candidates[std::clamp(place, 0, static_cast<int>(candidates.size()) - 1)];

  const Tile& tile = kVariants[chosen].tile;
  const int64_t row_tiles = divide_up(rows, tile.block_rows);
  const int64_t blocks = row_tiles * kv_heads;
  const int64_t key_tiles = divide_up(visible_span(a, tile, group), tile.block_keys);
  const auto slots = static_cast<int64_t>(kTacticTable[tactic].blocks_per_sm * device.sm_count);
  const int splits =
      choose_splits(blocks, slots, static_cast<int>(std::min<int64_t>(key_tiles, 1 << 20)));

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

size_t bound_of_workspace(const AttentionParams& largest, const Device& device,
                          const std::array<int, kVariantCount>& shared_bytes) {
  int64_t block_rows = 0;
  for (const int i : candidates_for(largest, device, shared_bytes)) {
    block_rows = std::max<int64_t>(block_rows, kVariants[i].tile.block_rows);
  }
  // In waves of n slots, x blocks use at least x / (x + n) of them: from 4 waves on that is enough
  // for choose_splits(), and its last step added fewer blocks than slots.
  constexpr int64_t kMostWaves = 5;
  static_assert(kMostWaves - 1 >= kEnoughUse * kMostWaves);
  const int64_t slots = int64_t{kMostBlocksPerSm} * device.sm_count;
  const int64_t rows = int64_t{largest.batch} * largest.heads * largest.queries;
  const int64_t split_rows = std::min(kMostWaves * slots * block_rows, kMostSplits * rows);
  const int64_t row_bytes =
      (largest.dtype == DType::kFloat32 ? 4 : 2) * largest.v_head_size + int64_t{sizeof(float)};
  return static_cast<size_t>(split_rows * row_bytes);
}

}  // namespace fastmqa
