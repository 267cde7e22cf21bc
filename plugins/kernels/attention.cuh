// SPDX-License-Identifier: MIT
#pragma once

#include <fastmqa/arch/launch.cuh>

#include "mainloop.cuh"

namespace fastmqa {

// Stores what the mainloop found: y and lse, or with split keys this split's part of them.
template <class Traits>
class Epilogue {
 public:
  using Element = typename Traits::Element;

  __device__ __forceinline__ Epilogue(const KernelParams& p, const Work<Traits>& work,
                                      typename Traits::SharedStorage& storage)
      : params_(p), work_(work), storage_(storage) {}

  __device__ __forceinline__ void store(Mainloop<Traits>& loop) const {
    divide(loop);
    const AttentionParams& a = params_.attention;
    if (params_.splits > 1) {
      const int64_t first = first_partial();
      auto* outputs = static_cast<Element*>(a.workspace) + first * a.v_head_size;
      auto* logs = reinterpret_cast<float*>(static_cast<char*>(a.workspace) +
                                            partial_outputs_bytes(params_));
      store_outputs(loop, [&](int row) { return outputs + int64_t{row} * a.v_head_size; });
      store_logs(loop, [&](int row) { return logs + first + row; });
      return;
    }
    auto* y = static_cast<Element*>(a.y) + work_.batch * a.y_strides.batch;
    store_outputs(loop, [&](int row) {
      return y + work_.head(row) * a.y_strides.head + work_.position(row) * a.y_strides.row;
    });
    if (a.lse == nullptr) return;
    auto* lse = a.lse + work_.batch * a.lse_strides.batch;
    store_logs(loop, [&](int row) {
      return lse + work_.head(row) * a.lse_strides.head + work_.position(row) * a.lse_strides.row;
    });
  }

 private:
  // Outputs become averages; a row without keys is 0, its log of a sum -inf.
  __device__ __forceinline__ static void divide(Mainloop<Traits>& loop) {
#pragma unroll
    for (int i = 0; i < Traits::kRowsPerLane; ++i) {
      const float sum = loop.softmax_.sum[i];
      const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
      for (int j = 0; j < Traits::kColumnFragments; ++j) {
        loop.outputs_[i / 2][j][i % 2 * 2] *= factor;
        loop.outputs_[i / 2][j][i % 2 * 2 + 1] *= factor;
      }
    }
  }

  // Where this split's part of the tile's rows lies in the workspace.
  __device__ __forceinline__ int64_t first_partial() const {
    const AttentionParams& a = params_.attention;
    return int64_t{work_.split} * params_.rows +
           (int64_t{work_.batch} * a.kv_heads + work_.kv_head) * a.queries * work_.group +
           work_.first_row;
  }

  // place(row) is where a row's log of its sum goes.
  template <class Place>
  __device__ __forceinline__ void store_logs(const Mainloop<Traits>& loop, Place place) const {
    for_each_row(loop, [&](int i, int row) {
      if (holds_row(loop)) *place(row) = loop.softmax_.log_of_sum(i);
    });
  }

  // place(row) is where a row's outputs begin.
  template <class Place>
  __device__ __forceinline__ void store_outputs(const Mainloop<Traits>& loop, Place place) const {
    const AttentionParams& a = params_.attention;
    if constexpr (Traits::kTensorCores) {
      // By way of shared memory, so that 16 bytes at a time are stored.
      auto& tile = storage_.y;
      __syncthreads();  // other warps may still read their queries
#pragma unroll
      for (int i = 0; i < Traits::kRowsPerLane; ++i) {
        for_each_pair(loop, i, [&](int column, float first, float second) {
          const uint32_t pair = tile::pack(first, second, Element{});
          std::memcpy(static_cast<void*>(tile.at(loop.lane_row(i), column)), &pair, sizeof pair);
        });
      }
      __syncthreads();
      using OutputTile = typename Traits::OutputTile;
      OutputTile::template for_each_chunk<Traits::kThreads>(
          [&](int, int row, int base, int offset) {
            const int column = (base + offset) * OutputTile::kPerChunk;
            if (row < work_.rows && column < a.v_head_size) {
              *reinterpret_cast<uint4*>(place(row) + column) =
                  *reinterpret_cast<const uint4*>(tile.chunk(row, base, offset));
            }
          });
    } else {
      for_each_row(loop, [&](int i, int row) {
        float* to = place(row);
        for_each_pair(loop, i, [&](int column, float first, float second) {
          if (column < a.v_head_size) {
            *reinterpret_cast<float2*>(to + column) = float2{first, second};
          }
        });
      });
    }
  }

  // Whether this lane speaks for its rows: one of the four that hold them, in the first warp.
  __device__ __forceinline__ static bool holds_row(const Mainloop<Traits>& loop) {
    return loop.share_.index == 0 && tile::lane_id() % 4 == 0;
  }

  // f(i, row) for this lane's rows that exist.
  template <class Function>
  __device__ __forceinline__ void for_each_row(const Mainloop<Traits>& loop, Function f) const {
#pragma unroll
    for (int i = 0; i < Traits::kRowsPerLane; ++i) {
      if (const int row = loop.lane_row(i); row < work_.rows) f(i, row);
    }
  }

  // f(column, value, next value) for this lane's outputs of its i-th row.
  template <class Function>
  __device__ __forceinline__ static void for_each_pair(const Mainloop<Traits>& loop, int i,
                                                       Function f) {
#pragma unroll
    for (int j = 0; j < Traits::kColumnFragments; ++j) {
      if (!loop.share_.has_column(j)) continue;
      f(loop.share_.column + j * tile::kFragmentColumns + tile::fragment_column(tile::lane_id()),
        loop.outputs_[i / 2][j][i % 2 * 2], loop.outputs_[i / 2][j][i % 2 * 2 + 1]);
    }
  }

  const KernelParams& params_;
  const Work<Traits> work_;
  typename Traits::SharedStorage& storage_;
};

// Of row kIndex of kVariants. Not a template of the Variant: with a class among the arguments, nvcc
// 13.0 writes a host stub that g++ does not compile.
template <int kIndex>
__global__ void __launch_bounds__(Traits<kVariants[kIndex]>::kThreads, 1)
    attention_kernel(const __grid_constant__ KernelParams params) {
  using T = Traits<kVariants[kIndex]>;
  auto& storage = dynamic_smem<typename T::SharedStorage>();
  Work<T> work(params);
  Mainloop<T> loop(params, work, storage);
  loop.run();
  work.forget_rows();
  Epilogue<T>(params, work, storage).store(loop);
}

}  // namespace fastmqa
