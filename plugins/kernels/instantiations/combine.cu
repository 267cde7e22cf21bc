// SPDX-License-Identifier: MIT
#include "../combine.cuh"
#include "../registry.h"

namespace fastmqa {
[[maybe_unused]] static const bool kEntered = [] {
  registry().combine_float16 = &combine_kernel<DType::kFloat16>;
  registry().combine_bfloat16 = &combine_kernel<DType::kBFloat16>;
  registry().combine_float32 = &combine_kernel<DType::kFloat32>;
  return true;
}();
}  // namespace fastmqa
