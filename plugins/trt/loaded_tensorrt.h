// SPDX-License-Identifier: MIT
//
// The TensorRT that this process has loaded already. The plugin is linked with none: it is loaded
// by TensorRT, by a server that has TensorRT, or by somebody who only looks at it.
#pragma once

namespace fastmqa::trt {

// The function of that name in the TensorRT of the major version that this was compiled for, or
// null. Another major's is not looked for: its interfaces have other virtual functions.
void* find_in_tensorrt(const char* function) noexcept;

}  // namespace fastmqa::trt
