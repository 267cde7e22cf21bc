// SPDX-License-Identifier: MIT
//
// How a kernel is started and how it gets its shared memory. The emulation of the tests has a file
// of this name with the same functions (tests/emulation).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace fastmqa {

// The block's dynamic shared memory as `Storage`.
template <class Storage>
__device__ __forceinline__ Storage& dynamic_smem() {
  extern __shared__ __align__(128) unsigned char raw[];
  return *reinterpret_cast<Storage*>(raw);
}

// Enqueues `kernel` and returns what CUDA says of the launch. Kernels take one struct by value.
template <class Params>
cudaError_t launch(void (*kernel)(Params), unsigned grid, unsigned block, size_t shared_bytes,
                   cudaStream_t stream, const Params& params) {
  constexpr size_t kWithoutOptIn = 48 << 10;
  if (shared_bytes > kWithoutOptIn) {
    if (const cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes))) {
      return error;
    }
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace fastmqa
