// SPDX-License-Identifier: MIT
#pragma once

#include <fastmqa/arch/launch.cuh>
#include <fastmqa/tile/fragment.cuh>
#include <fastmqa/tile/softmax.cuh>

#include "params.h"
#include "traits.cuh"

namespace fastmqa {

constexpr int kCombineThreads = 32 * kCombineRows;  // a warp per row

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

__device__ __forceinline__ float2 load_pair(const float* from) {
  return *reinterpret_cast<const float2*>(from);
}
__device__ __forceinline__ float2 load_pair(const __half* from) {
  return __half22float2(*reinterpret_cast<const __half2*>(from));
}
__device__ __forceinline__ float2 load_pair(const __nv_bfloat16* from) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(from));
}
__device__ __forceinline__ void store_pair(float* to, float x, float y) {
  *reinterpret_cast<float2*>(to) = float2{x, y};
}
__device__ __forceinline__ void store_pair(__half* to, float x, float y) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(x, y);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* to, float x, float y) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(x, y);
}

// Merges what the splits found: with lse_i the log of split i's sum of exponentials,
// lse = log sum_i exp(lse_i) and y = sum_i exp(lse_i - lse) y_i. A split without keys has lse_i =
// -inf and never wrote a y_i.
template <DType kDType>
__global__ void __launch_bounds__(kCombineThreads, 1)
    combine_kernel(const __grid_constant__ KernelParams p) {
  using Element = typename ElementOf<kDType>::Type;
  const AttentionParams& a = p.attention;
  const int lane = tile::lane_id();
  const int row = static_cast<int>(blockIdx.x) * kCombineRows + static_cast<int>(threadIdx.x) / 32;
  if (row >= p.rows) return;

  const Element* outputs =
      static_cast<const Element*>(a.workspace) + static_cast<int64_t>(row) * a.v_head_size;
  const float* logs = reinterpret_cast<const float*>(static_cast<const char*>(a.workspace) +
                                                     partial_outputs_bytes(p)) +
                      row;

  // Lane l looks after the splits l, l + 32, ...: their share of the result.
  float weights[kMostSplits / 32];
  float largest = -tile::kInfinity;
#pragma unroll
  for (int i = 0; i < kMostSplits / 32; ++i) {
    const int split = lane + 32 * i;
    weights[i] = split < p.splits ? logs[static_cast<int64_t>(split) * p.rows] : -tile::kInfinity;
    largest = fmaxf(largest, weights[i]);
  }
  const float anchor = tile::anchor(warp_max(largest));
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kMostSplits / 32; ++i) {
    weights[i] = tile::exponential(weights[i], anchor);
    sum += weights[i];
  }
  sum = warp_sum(sum);

  const int group_row = row % (a.queries * p.group);
  const int kv_head = row / (a.queries * p.group) % a.kv_heads;
  const int batch = row / (a.queries * p.group) / a.kv_heads;
  const int head = kv_head * p.group + group_row % p.group;
  const int position = group_row / p.group;
  if (lane == 0 && a.lse != nullptr) {
    a.lse[batch * a.lse_strides.batch + head * a.lse_strides.head + position * a.lse_strides.row] =
        anchor + logf(sum);
  }

  auto* y = static_cast<Element*>(a.y) + batch * a.y_strides.batch + head * a.y_strides.head +
            position * a.y_strides.row;
  const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (int first = 0; first < a.v_head_size; first += 64) {
    const int column = first + 2 * lane;
    float2 total{0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kMostSplits / 32; ++i) {
      const int count = min(32, p.splits - 32 * i);
      for (int j = 0; j < count; ++j) {
        const float weight = __shfl_sync(0xffffffffu, weights[i], j);
        if (weight == 0.0f || column >= a.v_head_size) continue;
        const int64_t split = 32 * i + j;
        const float2 part = load_pair(outputs + split * p.rows * a.v_head_size + column);
        total.x = fmaf(weight, part.x, total.x);
        total.y = fmaf(weight, part.y, total.y);
      }
    }
    if (column < a.v_head_size) store_pair(y + column, total.x * factor, total.y * factor);
  }
}

}  // namespace fastmqa
