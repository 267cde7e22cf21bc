// SPDX-License-Identifier: MIT
//
// The two matrix products of attention, on tensor cores and, for float32, on CUDA cores. Both
// spread their results over the lanes in the same way (tile/fragment.cuh), so that all between the
// products is written once.
#pragma once

#include <fastmqa/tile/fragment.cuh>

#include "traits.cuh"
#include "work.cuh"

namespace fastmqa {

// Where a warp's share of the block's tiles begins.
template <class Traits>
struct WarpShare {
  int row;     // of the block's rows
  int key;     // of a tile's keys
  int column;  // of V
  int index;   // among the warps that share these rows

  __device__ __forceinline__ WarpShare() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    index = Traits::kWarpsKeys == 1 ? 0 : warp % Traits::kWarpsKeys;
    row = warp / Traits::kWarpsKeys * Traits::kRowFragments * tile::kFragmentRows;
    key = index * Traits::kKeyFragments * tile::kFragmentColumns;
    column = index * Traits::kColumnFragments * tile::kFragmentColumns;
  }

  __device__ __forceinline__ bool has_keys() const {
    return Traits::kEveryWarpHasKeys || key < Traits::kBlockKeys;
  }

  // Whether a fragment of columns exists: V need not divide evenly among the warps.
  __device__ __forceinline__ bool has_column(int fragment) const {
    constexpr bool kEven =
        Traits::kColumnFragments * Traits::kWarpsKeys * tile::kFragmentColumns == Traits::kV;
    return kEven || column + fragment * tile::kFragmentColumns < Traits::kV;
  }
};

template <class Traits>
using Scores = float[Traits::kRowFragments][Traits::kKeyFragments][4];
template <class Traits>
using Outputs = float[Traits::kRowFragments][Traits::kColumnFragments][4];

// Probabilities as the second product takes them: on tensor cores pairs of a row's neighbouring
// keys, of rows lane / 4 and lane / 4 + 8; in float32 they lie as the scores did.
template <class Traits>
using Probabilities =
    std::conditional_t<Traits::kTensorCores,
                       uint32_t[Traits::kRowFragments][Traits::kKeyFragments][2], Scores<Traits>>;

template <class Traits>
class TensorCoreProducts {
 public:
  using Element = typename Traits::Element;
  using Share = WarpShare<Traits>;

  __device__ __forceinline__ TensorCoreProducts(const AttentionParams&, const Work<Traits>&,
                                                const Share& share)
      : share_(share) {}

  __device__ __forceinline__ void take_queries(const typename Traits::QueryTile& q) {
    if constexpr (Traits::kQueriesInRegisters) {
#pragma unroll
      for (int step = 0; step < kDepthSteps; ++step) load_queries(queries_[step], q, step);
    }
  }

  // scores = Q K^T. `live` is the range of this tile's keys that one of the warp's rows sees; an
  // edge tile leaves the scores of other keys 0.
  template <bool kEdge>
  __device__ __forceinline__ void scores(Scores<Traits>& s, const typename Traits::QueryTile& q,
                                         const typename Traits::KeyTile& k,
                                         const tile::KeyRange& live) const {
#pragma unroll(kUnroll)
    for (int step = 0; step < kDepthSteps; ++step) {
      uint32_t loaded[Traits::kRowFragments][4];
      if constexpr (!Traits::kQueriesInRegisters) load_queries(loaded, q, step);
      const auto& a = [&]() -> const auto& {
        if constexpr (Traits::kQueriesInRegisters) {
          return queries_[step];
        } else {
          return loaded;
        }
      }();
      const int column = step * tile::kFragmentDepth;
      if constexpr (Traits::kKeyFragments % 2 == 0) {
#pragma unroll
        for (int j = 0; j < Traits::kKeyFragments; j += 2) {
          const int key = share_.key + j * tile::kFragmentColumns;
          if (kEdge && !live.meets(key, 2 * tile::kFragmentColumns)) continue;
          uint32_t b[4];
          tile::load_right_pair(b, k, key, column);
#pragma unroll
          for (int i = 0; i < Traits::kRowFragments; ++i) {
            ptx::mma_16x8x16(s[i][j], a[i], b[0], b[1], Element{});
            ptx::mma_16x8x16(s[i][j + 1], a[i], b[2], b[3], Element{});
          }
        }
      } else {
        static_assert(Traits::kKeyFragments == 1);
        if (kEdge && !live.meets(share_.key, tile::kFragmentColumns)) continue;
        uint32_t b[2];
        tile::load_right(b, k, share_.key, column);
#pragma unroll
        for (int i = 0; i < Traits::kRowFragments; ++i) {
          ptx::mma_16x8x16(s[i][0], a[i], b[0], b[1], Element{});
        }
      }
    }
  }

  __device__ __forceinline__ void share(const Probabilities<Traits>& p,
                                        typename Traits::ProbabilityTile& tile) const {
    const int lane = tile::lane_id();
#pragma unroll
    for (int i = 0; i < Traits::kRowFragments; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kKeyFragments; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = share_.row + i * tile::kFragmentRows + tile::fragment_row(lane, half);
          const int key = share_.key + j * tile::kFragmentColumns + tile::fragment_column(lane);
          std::memcpy(static_cast<void*>(tile.at(row, key)), &p[i][j][half], sizeof(uint32_t));
        }
      }
    }
  }

  // outputs += P V, with P from this warp's registers, or from all warps where they share it.
  template <bool kEdge>
  __device__ __forceinline__ void accumulate(Outputs<Traits>& o, const Probabilities<Traits>& p,
                                             const typename Traits::SharedStorage& storage,
                                             const typename Traits::ValueTile& v,
                                             const tile::KeyRange& live) const {
#pragma unroll(kKeyUnroll)
    for (int key = 0; key < Traits::kBlockKeys; key += tile::kFragmentDepth) {
      if (kEdge && !live.meets(key, tile::kFragmentDepth)) continue;
      uint32_t a[Traits::kRowFragments][4];
#pragma unroll
      for (int i = 0; i < Traits::kRowFragments; ++i) {
        if constexpr (Traits::kSharesProbabilities) {
          tile::load_left(a[i], storage.p, share_.row + i * tile::kFragmentRows, key);
        } else {
          const int j = key / tile::kFragmentColumns;
          a[i][0] = p[i][j][0];
          a[i][1] = p[i][j][1];
          a[i][2] = p[i][j + 1][0];
          a[i][3] = p[i][j + 1][1];
        }
      }
#pragma unroll
      for (int j = 0; j < Traits::kColumnFragments; j += 2) {
        const int column = share_.column + j * tile::kFragmentColumns;
        if (j + 1 < Traits::kColumnFragments && share_.has_column(j + 1)) {
          uint32_t b[4];
          tile::load_right_pair_transposed(b, v, key, column);
#pragma unroll
          for (int i = 0; i < Traits::kRowFragments; ++i) {
            ptx::mma_16x8x16(o[i][j], a[i], b[0], b[1], Element{});
            ptx::mma_16x8x16(o[i][j + 1], a[i], b[2], b[3], Element{});
          }
        } else if (share_.has_column(j)) {
          uint32_t b[2];
          tile::load_right_transposed(b, v, key, column);
#pragma unroll
          for (int i = 0; i < Traits::kRowFragments; ++i) {
            ptx::mma_16x8x16(o[i][j], a[i], b[0], b[1], Element{});
          }
        }
      }
    }
  }

 private:
  static constexpr int kDepthSteps = Traits::kD / tile::kFragmentDepth;
  // Probabilities in registers are picked by constants; those in shared memory need not be.
  static constexpr int kKeyUnroll =
      Traits::kSharesProbabilities && Traits::kV > 256 ? 1 : Traits::kBlockKeys;
  // Queries from shared memory come a few columns at a time: fully unrolled, the compiler loads
  // more of them ahead than there are registers.
  static constexpr int kUnroll = Traits::kQueriesInRegisters || kDepthSteps <= 6 ? kDepthSteps : 4;

  __device__ __forceinline__ void load_queries(uint32_t (&a)[Traits::kRowFragments][4],
                                               const typename Traits::QueryTile& q,
                                               int step) const {
#pragma unroll
    for (int i = 0; i < Traits::kRowFragments; ++i) {
      tile::load_left(a[i], q, share_.row + i * tile::kFragmentRows, step * tile::kFragmentDepth);
    }
  }

  const Share share_;
  uint32_t queries_[Traits::kQueriesInRegisters ? kDepthSteps : 1][Traits::kRowFragments][4];
};

// float32. Correct first: queries come from global memory, a value of V is read by each lane that
// needs it.
template <class Traits>
class CudaCoreProducts {
 public:
  using Share = WarpShare<Traits>;

  __device__ __forceinline__ CudaCoreProducts(const AttentionParams& a, const Work<Traits>& work,
                                              const Share& share)
      : share_(share), depth_(a.head_size) {
    const auto* q = static_cast<const float*>(a.q) + work.batch * a.q_strides.batch;
#pragma unroll
    for (int i = 0; i < Traits::kRowsPerLane; ++i) {
      // Rows that do not exist repeat the last one; nobody stores their outputs.
      const int row =
          min(share.row + i / 2 * tile::kFragmentRows + tile::fragment_row(tile::lane_id(), i % 2),
              work.rows - 1);
      rows_[i] = q + work.head(row) * a.q_strides.head + work.position(row) * a.q_strides.row;
    }
  }

  template <bool kEdge, class Queries>
  __device__ __forceinline__ void scores(Scores<Traits>& s, const Queries&,
                                         const typename Traits::KeyTile& k,
                                         const tile::KeyRange&) const {
    if (!share_.has_keys()) return;
    const int first_key = share_.key + tile::fragment_column(tile::lane_id());
#pragma unroll 1
    for (int column = 0; column < depth_; column += Traits::KeyTile::kPerChunk) {
      float4 q[Traits::kRowsPerLane];
#pragma unroll
      for (int i = 0; i < Traits::kRowsPerLane; ++i) {
        q[i] = __ldg(reinterpret_cast<const float4*>(rows_[i] + column));
      }
#pragma unroll
      for (int j = 0; j < Traits::kKeyFragments; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float4 key = *reinterpret_cast<const float4*>(
              k.at(first_key + j * tile::kFragmentColumns + c, column));
#pragma unroll
          for (int i = 0; i < Traits::kRowsPerLane; ++i) {
            float& sum = s[i / 2][j][i % 2 * 2 + c];
            sum = fmaf(q[i].x, key.x, sum);
            sum = fmaf(q[i].y, key.y, sum);
            sum = fmaf(q[i].z, key.z, sum);
            sum = fmaf(q[i].w, key.w, sum);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void share(const Probabilities<Traits>& p,
                                        typename Traits::ProbabilityTile& tile) const {
    if (!share_.has_keys()) return;
    const int lane = tile::lane_id();
#pragma unroll
    for (int i = 0; i < Traits::kRowFragments; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kKeyFragments; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          *tile.at(share_.row + i * tile::kFragmentRows + tile::fragment_row(lane, c / 2),
                   share_.key + j * tile::kFragmentColumns + tile::fragment_column(lane) + c % 2) =
              p[i][j][c];
        }
      }
    }
  }

  template <bool kEdge>
  __device__ __forceinline__ void accumulate(Outputs<Traits>& o, const Probabilities<Traits>&,
                                             const typename Traits::SharedStorage& storage,
                                             const typename Traits::ValueTile& v,
                                             const tile::KeyRange&) const {
    const int lane = tile::lane_id();
#pragma unroll 1
    for (int key = 0; key < Traits::kBlockKeys; ++key) {
      float p[Traits::kRowsPerLane];
#pragma unroll
      for (int i = 0; i < Traits::kRowsPerLane; ++i) {
        p[i] = *storage.p.at(
            share_.row + i / 2 * tile::kFragmentRows + tile::fragment_row(lane, i % 2), key);
      }
#pragma unroll
      for (int j = 0; j < Traits::kColumnFragments; ++j) {
        if (!share_.has_column(j)) continue;
        const float2 values = *reinterpret_cast<const float2*>(
            v.at(key, share_.column + j * tile::kFragmentColumns + tile::fragment_column(lane)));
#pragma unroll
        for (int i = 0; i < Traits::kRowsPerLane; ++i) {
          o[i / 2][j][i % 2 * 2] = fmaf(p[i], values.x, o[i / 2][j][i % 2 * 2]);
          o[i / 2][j][i % 2 * 2 + 1] = fmaf(p[i], values.y, o[i / 2][j][i % 2 * 2 + 1]);
        }
      }
    }
  }

 private:
  const Share share_;
  const int depth_;
  const float* rows_[Traits::kRowsPerLane];
};

}  // namespace fastmqa
