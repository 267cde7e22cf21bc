// SPDX-License-Identifier: MIT
#include "../instantiate.cuh"

namespace fastmqa {
[[maybe_unused]] static const bool kEntered = instantiate<DType::kBFloat16, 128, 128, kAmpere>();
}  // namespace fastmqa
