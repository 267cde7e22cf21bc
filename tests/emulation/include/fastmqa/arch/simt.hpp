// SPDX-License-Identifier: MIT
//
// What nvcc knows without an #include, for g++: threadIdx, __syncthreads, __shfl_sync and so on.
// Each CUDA thread is a fiber of the launching OS thread; emulation.cpp decides which one runs.
//
// One warp runs until all its lanes wait at a block barrier, and one lane until it has to wait, in
// an order that the seed chooses, so a barrier that is missing has every chance to show.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#define __launch_bounds__(...)  // CUDA's headers make the other qualifiers empty for g++

// Of the fiber that runs; kept by the scheduler.
extern constinit thread_local uint3 threadIdx;
extern constinit thread_local uint3 blockIdx;
extern constinit thread_local dim3 blockDim;
extern constinit thread_local dim3 gridDim;

extern "C" {
// Chooses the order of blocks, warps and lanes of all launches that follow; 0 until called.
void fastmqa_emulation_seed(uint32_t seed);
// What went wrong in this OS thread's latest launch; empty if nothing did.
const char* fastmqa_emulation_error();
}

namespace simt {

inline constexpr uint32_t kAllLanes = 0xFFFFFFFF;
inline constexpr size_t kSharedAlignment = 128;

// A cp.async under way.
struct Copy {
  void* to;
  const void* from;  // null: zeros
  unsigned group;
};

struct Thread {
  std::vector<Copy> copies;  // oldest first
  unsigned groups = 0;       // committed ones
};

struct Shared {
  std::byte* begin;
  size_t bytes;
};

extern constinit thread_local Thread* thread;  // the fiber that runs
extern constinit thread_local Shared shared;   // its block's dynamic shared memory

// Ends the launch with this text, block and thread in front of it.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// Fails unless `address` is that of 16 aligned bytes of the block's shared memory.
void require_shared(const char* kind, const void* address);

// Publishes `operands` and parks. Null after the lanes of `mask` have met and the operation has
// been carried out; the last of them to arrive does not park, gets all operands and does that.
void* const* meet(const char* kind, uint32_t mask, void* operands);

void block_barrier();

// Runs `body(context)` as every thread of every block.
cudaError_t run_grid(unsigned grid, unsigned block, size_t shared_bytes, void (*body)(void*),
                     void* context);

// An operation of a whole warp. `carry_out(lane)` runs once for all of them, and finds the operands
// of lane l in `lane(l)`.
template <class Operands, class CarryOut>
void collective(const char* kind, uint32_t mask, Operands& operands, CarryOut carry_out) {
  if (void* const* all = meet(kind, mask, &operands)) {
    carry_out([all](int lane) -> Operands& { return *static_cast<Operands*>(all[lane]); });
  }
}

template <class T>
T shuffle(const char* kind, uint32_t mask, T value, int source) {
  struct Operands {
    T in, out;
    int source;
  } mine{value, value, source};
  collective(kind, mask, mine, [kind, mask](auto lane) {
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      const int from = lane(l).source & 31;
      if (!(mask >> from & 1)) fail("%s of lane %d, which the mask %08x lacks", kind, from, mask);
      lane(l).out = lane(from).in;
    }
  });
  return mine.out;
}

}  // namespace simt

using std::max;
using std::min;

inline void __syncthreads() { simt::block_barrier(); }

inline void __syncwarp(uint32_t mask = simt::kAllLanes) {
  int nothing = 0;
  simt::collective("__syncwarp", mask, nothing, [](auto) {});
}

inline int __any_sync(uint32_t mask, int predicate) {
  int any = 0;
  struct Vote {
    int predicate;
    int* any;
  } mine{predicate, &any};
  simt::collective("__any_sync", mask, mine, [mask](auto lane) {
    int found = 0;
    for (int l = 0; l < 32; ++l) {
      if (mask >> l & 1) found |= lane(l).predicate != 0;
    }
    for (int l = 0; l < 32; ++l) {
      if (mask >> l & 1) *lane(l).any = found;
    }
  });
  return any;
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source) {
  return simt::shuffle("__shfl_sync", mask, value, source);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask) {
  return simt::shuffle("__shfl_xor_sync", mask, value, static_cast<int>(threadIdx.x) ^ lane_mask);
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

[[noreturn]] inline void __trap() { simt::fail("__trap"); }

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
