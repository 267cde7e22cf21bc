// SPDX-License-Identifier: MIT
//
// From a product q.k to a score: scale, softcap, mask, and which keys a query sees at all.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <fastmqa/attention.h>

#include <fastmqa/arch/ptx.cuh>
#include <fastmqa/tile/softmax.cuh>

namespace fastmqa::tile {

// Positions begin .. end - 1; empty where begin >= end.
struct alignas(8) KeyRange {
  int begin;
  int end;

  __host__ __device__ constexpr bool empty() const { return begin >= end; }
  __host__ __device__ constexpr bool holds(int key) const { return begin <= key && key < end; }
  __host__ __device__ constexpr bool meets(int first, int count) const {
    return first < end && begin < first + count;
  }
  __host__ __device__ constexpr bool covers(int first, int count) const {
    return begin <= first && first + count <= end;
  }
};

// The keys that a query at `position` sees, of `length` valid ones.
__host__ __device__ constexpr KeyRange visible_keys(int64_t position, int length, int window_left,
                                                    int window_right) {
  const int64_t begin = window_left < 0 ? 0 : position - window_left;
  const int64_t end = window_right < 0 ? length : position + window_right + 1;
  const auto clamp = [length](int64_t key) {
    return static_cast<int>(key < 0 ? 0 : key > length ? length : key);
  };
  return {clamp(begin), clamp(end)};
}

// c tanh(x / c). float32 gets the exact function; for the 16-bit types an absolute error of about
// 1e-7 c, from 1 - 2 / (1 + exp(2x / c)), is far below a rounding of the products.
__device__ __forceinline__ float soft_cap(float x, float cap, bool exact) {
  if (exact) return cap * tanhf(x / cap);
  return cap - 2.0f * cap * ptx::rcp(1.0f + ptx::ex2(2.0f * kLog2E / cap * x));
}

// What a mask's element adds to a score: the number itself, or 0 and -inf for true and false.
__device__ __forceinline__ float mask_addend(uint8_t may_attend) {
  return may_attend != 0 ? 0.0f : -kInfinity;
}
__device__ __forceinline__ float mask_addend(float x) { return x; }
__device__ __forceinline__ float mask_addend(__half x) { return __half2float(x); }
__device__ __forceinline__ float mask_addend(__nv_bfloat16 x) { return __bfloat162float(x); }

}  // namespace fastmqa::tile
