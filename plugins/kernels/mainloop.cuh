// SPDX-License-Identifier: MIT
#pragma once

#include <fastmqa/tile/softmax.cuh>

#include "pipeline.cuh"
#include "products.cuh"

namespace fastmqa {

// Attention of one block's rows over its keys, one tile of keys after the other
// (FlashAttention-2, arXiv:2307.08691, algorithm 1). Prefill and decode, one head or many: the
// same.
template <class Traits>
class Mainloop {
 public:
  using Storage = typename Traits::SharedStorage;
  using Element = typename Traits::Element;

  __device__ __forceinline__ Mainloop(const KernelParams& p, const Work<Traits>& work,
                                      Storage& storage)
      : attention_(p.attention),
        work_(work),
        storage_(storage),
        pipeline_(p, work, storage),
        products_(p.attention, work, share_) {
    pipeline_.start(p, work);
    note_visible_keys();
    softmax_.reset(raw_scores() ? attention_.scale * tile::kLog2E : tile::kLog2E);
    live_ = work.seen_by_any(share_.row, Traits::kRowFragments * tile::kFragmentRows);
  }

  __device__ __forceinline__ void run() {
    take_queries();
    for (int tile = work_.first_tile; tile < work_.last_tile; ++tile) {
      const int first_key = tile * Traits::kBlockKeys;
      if (attention_.mask_dtype == DType::kNone &&
          work_.common.covers(first_key, Traits::kBlockKeys)) {
        step<false>(tile);
      } else {
        step<true>(tile);
      }
    }
    reduce_sums();
  }

  // Which of the block's rows is this lane's i-th.
  __device__ __forceinline__ int lane_row(int i) const {
    return share_.row + i / 2 * tile::kFragmentRows + tile::fragment_row(tile::lane_id(), i % 2);
  }

  WarpShare<Traits> share_;
  tile::OnlineSoftmax<Traits::kRowsPerLane> softmax_;
  Outputs<Traits> outputs_ = {};  // not yet divided by the sums

 private:
  using Products = std::conditional_t<Traits::kTensorCores, TensorCoreProducts<Traits>,
                                      CudaCoreProducts<Traits>>;

  // One tile of keys. In an edge tile, or with a mask, some rows do not see some keys.
  template <bool kEdge>
  __device__ __forceinline__ void step(int tile) {
    const int first_key = tile * Traits::kBlockKeys;
    const tile::KeyRange live{live_.begin - first_key, live_.end - first_key};
    Scores<Traits> scores = {};
    Probabilities<Traits> probabilities;

    const auto& k = pipeline_.await_keys(tile);
    if (!live_.empty()) products_.template scores<kEdge>(scores, storage_.q, k, live);
    scale(scores);
    if constexpr (kEdge) {
      add_mask(scores, first_key);
      hide(scores, first_key);
    }
    if (!share_.has_keys()) for_each(scores, [](float& score) { score = -tile::kInfinity; });
    if (half_softmax()) round_to_half(scores);
    raise_maxima(scores);
    exponentiate(probabilities, scores);
    if constexpr (Traits::kSharesProbabilities) products_.share(probabilities, storage_.p);

    const auto& v = pipeline_.await_values(tile);
    if (!live_.empty()) {
      products_.template accumulate<kEdge>(outputs_, probabilities, storage_, v, live);
    }
  }

  __device__ __forceinline__ void note_visible_keys() {
    for (int row = static_cast<int>(threadIdx.x); row < work_.rows; row += Traits::kThreads) {
      storage_.visible[row] = work_.row_keys(row);
    }
  }

  __device__ __forceinline__ void take_queries() {
    if constexpr (Traits::kTensorCores) {
      products_.take_queries(pipeline_.await_queries());
    } else {
      __syncthreads();
    }
  }

  // Whether scores stay the products q.k until they are exponentiated, which saves the
  // multiplications by the scale. float32 has no rounding to spare for it.
  __device__ __forceinline__ bool raw_scores() const {
    return Traits::kTensorCores && attention_.scale > 0.0f && attention_.softcap == 0.0f &&
           attention_.mask_dtype == DType::kNone && !half_softmax();
  }

  __device__ __forceinline__ void scale(Scores<Traits>& s) const {
    if (raw_scores()) return;
    for_each(s, [&](float& score) { score *= attention_.scale; });
    if (attention_.softcap > 0.0f) {
      for_each(s, [&](float& score) {
        score = tile::soft_cap(score, attention_.softcap, !Traits::kTensorCores);
      });
    }
  }

  // -inf where a row does not see a key.
  __device__ __forceinline__ void hide(Scores<Traits>& s, int first_key) const {
#pragma unroll
    for (int i = 0; i < Traits::kRowsPerLane; ++i) {
      const int row = lane_row(i);
      const tile::KeyRange visible =
          row < work_.rows ? storage_.visible[row] : tile::KeyRange{0, 0};
#pragma unroll
      for (int j = 0; j < Traits::kKeyFragments; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (!visible.holds(first_key + lane_key(j, c))) {
            s[i / 2][j][i % 2 * 2 + c] = -tile::kInfinity;
          }
        }
      }
    }
  }

  __device__ __forceinline__ void add_mask(Scores<Traits>& s, int first_key) const {
    switch (attention_.mask_dtype) {
      case DType::kNone:
        return;
      case DType::kBool:
        return add_mask_of<uint8_t>(s, first_key);
      case DType::kFloat32:
        return add_mask_of<float>(s, first_key);
      default:
        return add_mask_of<Element>(s, first_key);
    }
  }

  template <class MaskElement>
  __device__ __forceinline__ void add_mask_of(Scores<Traits>& s, int first_key) const {
    const MaskStrides& strides = attention_.mask_strides;
    const auto* mask = static_cast<const MaskElement*>(attention_.attn_mask) +
                       work_.batch * strides.batch + first_key * strides.key;
#pragma unroll
    for (int i = 0; i < Traits::kRowsPerLane; ++i) {
      const int row = ptx::opaque(lane_row(i));  // or its place in the mask is kept for all tiles
      if (row >= work_.rows) continue;
      const MaskElement* mask_row =
          mask + work_.head(row) * strides.head + work_.position(row) * strides.row;
#pragma unroll
      for (int j = 0; j < Traits::kKeyFragments; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int key = lane_key(j, c);
          if (first_key + key < attention_.keys) {
            s[i / 2][j][i % 2 * 2 + c] += tile::mask_addend(mask_row[key * strides.key]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ bool half_softmax() const {
    return std::is_same_v<Element, __half> && attention_.softmax_precision == DType::kFloat16;
  }

  __device__ __forceinline__ void round_to_half(Scores<Traits>& s) const {
    for_each(s, [](float& score) { score = __half2float(__float2half_rn(score)); });
  }

  // Takes this tile's scores into the maxima, and shrinks what was summed so far accordingly.
  __device__ __forceinline__ void raise_maxima(const Scores<Traits>& s) {
    float largest[Traits::kRowsPerLane];
#pragma unroll
    for (int i = 0; i < Traits::kRowsPerLane; ++i) {
      largest[i] = -tile::kInfinity;
#pragma unroll
      for (int j = 0; j < Traits::kKeyFragments; ++j) {
        largest[i] = fmaxf(largest[i], fmaxf(s[i / 2][j][i % 2 * 2], s[i / 2][j][i % 2 * 2 + 1]));
      }
      largest[i] = tile::row_max(largest[i]);
    }
    if constexpr (Traits::kWarpsKeys > 1) {
      exchange(largest, storage_.row_max, [](float a, float b) { return fmaxf(a, b); });
    }
    float shrink[Traits::kRowsPerLane];
    bool shrinks = false;
#pragma unroll
    for (int i = 0; i < Traits::kRowsPerLane; ++i) {
      shrink[i] = softmax_.raise(i, largest[i]);
      shrinks |= shrink[i] != 1.0f;
    }
    // After a few tiles the maxima are seldom raised.
    if (!__any_sync(0xffffffffu, shrinks)) return;
#pragma unroll
    for (int i = 0; i < Traits::kRowsPerLane; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kColumnFragments; ++j) {
        outputs_[i / 2][j][i % 2 * 2] *= shrink[i];
        outputs_[i / 2][j][i % 2 * 2 + 1] *= shrink[i];
      }
    }
  }

  // probabilities = exp(scores - maxima), not yet divided by their sums.
  __device__ __forceinline__ void exponentiate(Probabilities<Traits>& p, const Scores<Traits>& s) {
    if constexpr (std::is_same_v<Element, __half>) {
      if (half_softmax()) {
        for_each_pair(s, [&](int i, int j, float first, float second) {
          const __half2 pair = tile::exponential_half(first, second, tile::anchor(softmax_.max[i]));
          softmax_.sum[i] += __low2float(pair) + __high2float(pair);
          std::memcpy(&p[i / 2][j][i % 2], &pair, sizeof pair);
        });
        return;
      }
    }
    const float unit = softmax_.unit;
    if (raw_scores()) {
      for_each_pair(s, [&](int i, int j, float first, float second) {
        const float offset = -tile::anchor(softmax_.max[i]) * unit;
        keep(p, i, j, ptx::ex2(fmaf(first, unit, offset)), ptx::ex2(fmaf(second, unit, offset)));
      });
      return;
    }
    for_each_pair(s, [&](int i, int j, float first, float second) {
      const float anchor = tile::anchor(softmax_.max[i]);
      keep(p, i, j, tile::exponential(first, anchor), tile::exponential(second, anchor));
    });
  }

  // Two probabilities of this lane's i-th row and j-th fragment of keys.
  __device__ __forceinline__ void keep(Probabilities<Traits>& p, int i, int j, float first,
                                       float second) {
    softmax_.sum[i] += first + second;
    if constexpr (Traits::kTensorCores) {
      p[i / 2][j][i % 2] = tile::pack(first, second, Element{});
    } else {
      p[i / 2][j][i % 2 * 2] = first;
      p[i / 2][j][i % 2 * 2 + 1] = second;
    }
  }

  // From each lane's own columns to whole rows.
  __device__ __forceinline__ void reduce_sums() {
#pragma unroll
    for (int i = 0; i < Traits::kRowsPerLane; ++i) softmax_.sum[i] = tile::row_sum(softmax_.sum[i]);
    if constexpr (Traits::kWarpsKeys > 1) {
      exchange(softmax_.sum, storage_.row_sum, [](float a, float b) { return a + b; });
    }
  }

  // Combines what the warps that share rows found for them.
  template <class Combine>
  __device__ __forceinline__ void exchange(float (&values)[Traits::kRowsPerLane],
                                           float (&shared)[Traits::kWarpsKeys][Traits::kBlockRows],
                                           Combine combine) {
    if (tile::lane_id() % 4 == 0) {
#pragma unroll
      for (int i = 0; i < Traits::kRowsPerLane; ++i) shared[share_.index][lane_row(i)] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Traits::kRowsPerLane; ++i) {
      values[i] = shared[0][lane_row(i)];
#pragma unroll
      for (int warp = 1; warp < Traits::kWarpsKeys; ++warp) {
        values[i] = combine(values[i], shared[warp][lane_row(i)]);
      }
    }
  }

  // Which key of a tile is this lane's c-th in its j-th fragment.
  __device__ __forceinline__ int lane_key(int j, int c) const {
    return share_.key + j * tile::kFragmentColumns + tile::fragment_column(tile::lane_id()) + c;
  }

  // f(i, j, score, next score) for this lane's i-th row and j-th fragment of keys.
  template <class Function>
  __device__ __forceinline__ static void for_each_pair(const Scores<Traits>& s, Function f) {
#pragma unroll
    for (int i = 0; i < Traits::kRowsPerLane; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kKeyFragments; ++j) {
        f(i, j, s[i / 2][j][i % 2 * 2], s[i / 2][j][i % 2 * 2 + 1]);
      }
    }
  }

  template <class Function>
  __device__ __forceinline__ static void for_each(Scores<Traits>& s, Function f) {
#pragma unroll
    for (int i = 0; i < Traits::kRowFragments; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kKeyFragments; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) f(s[i][j][c]);
      }
    }
  }

  const AttentionParams& attention_;
  const Work<Traits> work_;  // a copy: what has an address is kept in memory
  Storage& storage_;
  Pipeline<Traits> pipeline_;
  Products products_;
  tile::KeyRange live_;  // keys that one of this warp's rows sees
};

}  // namespace fastmqa
