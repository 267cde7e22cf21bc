// SPDX-License-Identifier: MIT
//
// The online softmax (Milakov and Gimelshein, arXiv:1805.02867): rows are seen a few keys at a
// time, and what was summed before shrinks when a larger score turns up.
#pragma once

#include <fastmqa/arch/ptx.cuh>

namespace fastmqa::tile {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;
constexpr float kInfinity = __builtin_huge_valf();

// What is subtracted from a row's scores before exp. A row that has seen no key yet has the
// maximum -inf, and -inf - -inf would be NaN; from 0, exp(-inf) is the 0 that it should be.
__device__ __forceinline__ float anchor(float max) { return max == -kInfinity ? 0.0f : max; }

// exp(score - anchor). Subtracting first keeps scores of any size exact: with a finite minimum as
// mask, score * log2(e) would overflow.
__device__ __forceinline__ float exponential(float score, float anchor) {
  return ptx::ex2((score - anchor) * kLog2E);
}

// The same for two scores that are float16 values; the difference, its product with log2(e) and
// the result are rounded to float16.
__device__ __forceinline__ __half2 exponential_half(float score0, float score1, float anchor) {
  const __half2 difference = __floats2half2_rn(score0 - anchor, score1 - anchor);
  // log2(e) in two float16 parts, so that the product is rounded once. Both parts are positive:
  // -inf stays -inf.
  const __half2 high = __float2half2_rn(1.4423828125f);
  const __half2 low = __float2half2_rn(3.12228e-4f);
  const __half2 zero = __float2half2_rn(0.0f);
  return ptx::ex2(ptx::fma(difference, high, ptx::fma(difference, low, zero)));
}

// Maximum and sum of kRows rows, of which this lane holds some columns. The sums are of this
// lane's columns only until they are reduced, the maxima are of whole rows always.
template <int kRows>
struct OnlineSoftmax {
  float max[kRows];
  float sum[kRows];
  float unit;  // what a difference of 1 between two scores means; log2(e) if they are natural

  __device__ __forceinline__ void reset(float score_unit) {
    unit = score_unit;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      max[i] = -kInfinity;
      sum[i] = 0.0f;
    }
  }

  // Takes note of a row's largest new score; returns the factor for all that was summed before.
  __device__ __forceinline__ float raise(int row, float largest) {
    const float before = max[row];
    max[row] = fmaxf(before, largest);
    const float shrink = ptx::ex2((before - anchor(max[row])) * unit);
    sum[row] *= shrink;
    return shrink;
  }

  // Natural log of a row's sum of exponentials; -inf where there was no key.
  __device__ __forceinline__ float log_of_sum(int row) const {
    return max[row] * (unit * kLn2) + logf(sum[row]);
  }
};

// Over the four lanes that hold one row of a fragment.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

}  // namespace fastmqa::tile
