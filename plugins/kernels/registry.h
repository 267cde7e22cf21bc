// SPDX-License-Identifier: MIT
//
// Which kernels this library holds. Each file in instantiations/ enters its own, so that a library
// of a few of them is made by compiling a few of the files.
#pragma once

#include <array>

#include "params.h"
#include "variants.h"

namespace fastmqa {

using Kernel = void (*)(KernelParams);

struct Registry {
  std::array<Kernel, kVariantCount> attention;  // null where it is not built
  std::array<int, kVariantCount> shared_bytes;  // likewise 0
  Kernel combine_float16, combine_bfloat16, combine_float32;
};

inline Registry& registry() {
  static Registry built{};
  return built;
}

}  // namespace fastmqa
