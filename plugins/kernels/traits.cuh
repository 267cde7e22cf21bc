// SPDX-License-Identifier: MIT
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <fastmqa/arch/policy.h>

#include <fastmqa/tile/fragment.cuh>
#include <fastmqa/tile/mask.cuh>
#include <fastmqa/tile/smem_tile.cuh>
#include <type_traits>

#include "variants.h"

namespace fastmqa {

template <DType kDType>
struct ElementOf;
template <>
struct ElementOf<DType::kFloat16> {
  using Type = __half;
};
template <>
struct ElementOf<DType::kBFloat16> {
  using Type = __nv_bfloat16;
};
template <>
struct ElementOf<DType::kFloat32> {
  using Type = float;
};

// Everything about a variant that is known at compile time.
template <Variant kVariant>
struct Traits {
  using Element = typename ElementOf<kVariant.dtype>::Type;

  static constexpr int kD = kVariant.tile.head_size;
  static constexpr int kV = kVariant.tile.v_head_size;
  static constexpr int kBlockRows = kVariant.tile.block_rows;
  static constexpr int kBlockKeys = kVariant.tile.block_keys;
  static constexpr int kStages = kVariant.tile.stages;
  static constexpr bool kValuesInK = kVariant.tile.values_in_k;

  static constexpr int kWarpsRows = kVariant.tile.warps_rows;
  static constexpr int kWarpsKeys = kVariant.tile.warps_keys;
  static constexpr int kThreads = threads_of(kVariant.tile);

  static constexpr bool kTensorCores = !std::is_same_v<Element, float>;
  // float32 leaves it to the SM, where SM75 copies at once: registers are short there.
  static constexpr bool kAsync = has_async_copy(kVariant.min_sm) || !kTensorCores;

  // A warp's share: rows of scores and outputs, keys of a tile, columns of V, all in fragments.
  static constexpr int kRowFragments = kBlockRows / kWarpsRows / tile::kFragmentRows;
  // (Where a tile has fewer fragments of keys than warps, the others only take columns.)
  static constexpr int kKeyFragments = kBlockKeys < kWarpsKeys * tile::kFragmentColumns
                                           ? 1
                                           : kBlockKeys / kWarpsKeys / tile::kFragmentColumns;
  static constexpr bool kEveryWarpHasKeys =
      kKeyFragments * kWarpsKeys * tile::kFragmentColumns == kBlockKeys;
  static constexpr int kColumnFragments =
      (kV / tile::kFragmentColumns + kWarpsKeys - 1) / kWarpsKeys;
  static constexpr int kRowsPerLane = 2 * kRowFragments;

  // Probabilities go from the warps that made them to all that need them.
  static constexpr bool kSharesProbabilities = kWarpsKeys > 1 || !kTensorCores;
  // 32 registers' worth of queries stay in registers, more would crowd out the accumulators.
  static constexpr bool kQueriesInRegisters = kTensorCores && kRowFragments * kD <= 128;

  using QueryTile = tile::SmemTile<Element, kBlockRows, kD>;
  using KeyTile = tile::SmemTile<Element, kBlockKeys, kD>;
  using ValueTile =
      std::conditional_t<kValuesInK, KeyTile, tile::SmemTile<Element, kBlockKeys, kV>>;
  using ProbabilityTile = tile::SmemTile<Element, kBlockRows, kBlockKeys>;
  using OutputTile = tile::SmemTile<Element, kBlockRows, kV>;

  struct NoRows {};

  // All of a block's shared memory.
  struct SharedStorage {
    // Once the last scores are computed, the outputs take the queries' place. float32 reads its
    // queries from global memory and stores its outputs from registers.
    union {
      std::conditional_t<kTensorCores, QueryTile, tile::NoTile> q;   // (block_rows, D)
      std::conditional_t<kTensorCores, OutputTile, tile::NoTile> y;  // (block_rows, V)
    };
    KeyTile k[kStages];                                                         // (block_keys, D)
    std::conditional_t<kValuesInK, tile::NoTile, ValueTile> v[kStages];         // (block_keys, V)
    std::conditional_t<kSharesProbabilities, ProbabilityTile, tile::NoTile> p;  // (rows, keys)
    float row_max[kWarpsKeys > 1 ? kWarpsKeys : 1][kBlockRows];  // of one tile, per warp over keys
    float row_sum[kWarpsKeys > 1 ? kWarpsKeys : 1][kBlockRows];  // of all tiles, likewise
    tile::KeyRange visible[kBlockRows];                          // keys that each row sees
  };

  static_assert(kBlockRows % (kWarpsRows * tile::kFragmentRows) == 0);
  static_assert(kEveryWarpHasKeys || !kTensorCores);
  static_assert(kBlockKeys % tile::kFragmentDepth == 0 && kD % tile::kFragmentDepth == 0);
  static_assert(kWarpsKeys > 1 || kKeyFragments % 2 == 0, "probabilities pair up to operands");
  static_assert(kAsync || kStages == 1, "registers hold one tile on its way");
  static_assert(sizeof(SharedStorage) <= (163 << 10), "more than an A100 has");
  static_assert(kVariant.min_sm > kTuring || sizeof(SharedStorage) <= least_shared_bytes(kTuring));
};

}  // namespace fastmqa
