// SPDX-License-Identifier: MIT
//
// In the place of plugins/include/fastmqa/arch/launch.cuh: a launch runs the kernel at once.
#pragma once

#include <fastmqa/arch/simt.hpp>

namespace fastmqa {

// The block's dynamic shared memory as `Storage`: NaN (0xFF bytes) until the kernel writes there.
template <class Storage>
Storage& dynamic_smem() {
  static_assert(alignof(Storage) <= simt::kSharedAlignment);
  if (sizeof(Storage) > simt::shared.bytes) {
    simt::fail("wants %zu bytes of shared memory and was launched with %zu", sizeof(Storage),
               simt::shared.bytes);
  }
  return *reinterpret_cast<Storage*>(simt::shared.begin);
}

// cudaErrorLaunchFailure: see fastmqa_emulation_error().
template <class Params>
cudaError_t launch(void (*kernel)(Params), unsigned grid, unsigned block, size_t shared_bytes,
                   cudaStream_t /*stream*/, const Params& params) {
  struct Call {
    void (*kernel)(Params);
    const Params& params;
  } call{kernel, params};
  const auto body = [](void* context) {
    const auto& call = *static_cast<const Call*>(context);
    call.kernel(call.params);
  };
  return simt::run_grid(grid, block, shared_bytes, body, &call);
}

}  // namespace fastmqa
