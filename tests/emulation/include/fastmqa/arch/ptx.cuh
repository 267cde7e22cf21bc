// SPDX-License-Identifier: MIT
//
// In the place of plugins/include/fastmqa/arch/ptx.cuh: functions with the same signatures, after
// the lane maps of the PTX ISA 8.x manual.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <fastmqa/arch/simt.hpp>

namespace fastmqa::ptx {

namespace emulated {

// CUDA's own conversion on the host branches; this does not.
inline float to_float(uint16_t bits, __half) {
  const uint32_t magnitude = (bits & 0x7FFFu) << 13;
  const uint32_t special = (bits & 0x7C00u) == 0x7C00u ? 0x7F800000u : 0u;  // infinity and NaN
  const auto rescaled = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  return std::bit_cast<float>((bits & 0x8000u) << 16 | rescaled | special);
}

inline float to_float(uint16_t bits, __nv_bfloat16) {
  return std::bit_cast<float>(uint32_t{bits} << 16);
}

inline float to_float(__half x) { return to_float(__half_as_ushort(x), x); }

template <int kMatrices, bool kTransposed>
void ldmatrix(const char* kind, uint32_t (&d)[kMatrices], const void* row) {
  simt::require_shared(kind, row);  // on SM75 of every lane, whether its row is read or not
  struct Operands {
    uint32_t* d;
    const void* row;
  } mine{d, row};
  simt::collective(kind, simt::kAllLanes, mine, [](auto lane) {
    for (int i = 0; i < kMatrices; ++i) {
      uint16_t matrix[8][8];
      for (int r = 0; r < 8; ++r) std::memcpy(matrix[r], lane(8 * i + r).row, sizeof matrix[r]);
      for (int l = 0; l < 32; ++l) {
        const int major = l / 4, minor = l % 4 * 2;
        const uint32_t low = kTransposed ? matrix[minor][major] : matrix[major][minor];
        const uint32_t high = kTransposed ? matrix[minor + 1][major] : matrix[major][minor + 1];
        lane(l).d[i] = high << 16 | low;
      }
    }
  });
}

// Checks of array bounds would take most of the tests' time here.
__attribute__((no_sanitize_undefined)) inline void multiply_add(float (&d)[16][8],
                                                                const float (&a)[16][16],
                                                                const float (&b)[16][8]) {
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
}

template <class Element>
void mma(const char* kind, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  simt::collective(kind, simt::kAllLanes, mine, [](auto lane) {
    float a[16][16], b[16][8], d[16][8];
    const auto element = [](uint32_t two, int which) {
      return to_float(static_cast<uint16_t>(two >> 16 * which), Element{});
    };
    for (int l = 0; l < 32; ++l) {
      const auto& of = lane(l);
      const int g = l / 4, t = l % 4 * 2;
      for (int e = 0; e < 2; ++e) {
        for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t + e + r / 2 * 8] = element(of.a[r], e);
        for (int r = 0; r < 2; ++r) b[t + e + r * 8][g] = element(of.b[r], e);
      }
      for (int r = 0; r < 4; ++r) d[g + r / 2 * 8][t + r % 2] = of.d[r];
    }
    multiply_add(d, a, b);
    for (int l = 0; l < 32; ++l) {
      for (int r = 0; r < 4; ++r) lane(l).d[r] = d[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
    }
  });
}

}  // namespace emulated

// "ldmatrix": rows from lanes 8i .. 8i+7, elements (l / 4, 2 (l % 4) + {0, 1}) to lane l.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], const void* row) {
  emulated::ldmatrix<4, false>("ldmatrix.x4", d, row);
}

// Likewise with two matrices, of lanes 0 .. 15.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&d)[2], const void* row) {
  emulated::ldmatrix<2, false>("ldmatrix.x2", d, row);
}

// "ldmatrix.trans": elements (2 (l % 4) + {0, 1}, l / 4) to lane l.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row) {
  emulated::ldmatrix<4, true>("ldmatrix.x4.trans", d, row);
}

// Likewise with two matrices, of lanes 0 .. 15.
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&d)[2], const void* row) {
  emulated::ldmatrix<2, true>("ldmatrix.x2.trans", d, row);
}

// "mma.m16n8k16", g = l / 4, t = l % 4: a (g + {0, 8}, 2t + {0, 1} + {0, 8}), b (2t + {0, 1} +
// {0, 8}, g), d (g + {0, 8}, 2t + {0, 1}). The order of the sums is left open by PTX.
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1, __half) {
  emulated::mma<__half>("mma.f16", d, a, b0, b1);
}

// The same lane map with bfloat16.
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1, __nv_bfloat16) {
  emulated::mma<__nv_bfloat16>("mma.bf16", d, a, b0, b1);
}

// "st.shared.v4".
__device__ __forceinline__ void store_shared_16(void* shared, uint4 x) {
  simt::require_shared("st.shared.v4", shared);
  std::memcpy(shared, &x, sizeof x);
}

// "cp.async": NaN at `shared` from here to the wait, which is when `global` is read.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  simt::require_shared("cp.async", shared);
  if (reinterpret_cast<uintptr_t>(global) % 16) simt::fail("cp.async from %p, unaligned", global);
  std::memset(shared, 0xFF, 16);
  simt::thread->copies.push_back({shared, valid ? global : nullptr, simt::thread->groups});
}

// "cp.async.commit_group": of this thread alone.
__device__ __forceinline__ void cp_async_commit() { ++simt::thread->groups; }

// "cp.async.wait_group": copies not committed stay under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  auto& copies = simt::thread->copies;
  auto copy = copies.begin();
  for (; copy != copies.end() && copy->group + kPending < simt::thread->groups; ++copy) {
    if (copy->from) {
      std::memcpy(copy->to, copy->from, 16);
    } else {
      std::memset(copy->to, 0, 16);
    }
  }
  copies.erase(copies.begin(), copy);
}

// "ex2.approx.ftz.f32": subnormal results are 0.
__device__ __forceinline__ float ex2(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

// "ex2.approx.f16x2".
__device__ __forceinline__ __half2 ex2(__half2 x) {
  return {__float2half(exp2f(emulated::to_float(x.x))),
          __float2half(exp2f(emulated::to_float(x.y)))};
}

// "fma.rn.f16x2": a float64 holds all but a few sums of a product and a float16.
__device__ __forceinline__ __half2 fma(__half2 a, __half2 b, __half2 c) {
  const auto one = [](__half a, __half b, __half c) {
    return __double2half(double{emulated::to_float(a)} * emulated::to_float(b) +
                         emulated::to_float(c));
  };
  return {one(a.x, b.x, c.x), one(a.y, b.y, c.y)};
}

// "rcp".
__device__ __forceinline__ float rcp(float x) {
  const float y = 1.0f / x;
  return std::fabs(y) < std::numeric_limits<float>::min() ? std::copysign(0.0f, y) : y;
}

// Nothing to hide: registers are not counted here.
__device__ __forceinline__ int opaque(int x) { return x; }

}  // namespace fastmqa::ptx
