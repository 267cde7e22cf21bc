// SPDX-License-Identifier: MIT
#include "../instantiate.cuh"

namespace fastmqa {
[[maybe_unused]] static const bool kEntered = instantiate<DType::kBFloat16, 64, 64, kAmpere>();
}  // namespace fastmqa
