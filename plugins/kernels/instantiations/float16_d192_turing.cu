// SPDX-License-Identifier: MIT
#include "../instantiate.cuh"

namespace fastmqa {
[[maybe_unused]] static const bool kEntered = instantiate<DType::kFloat16, 192, 192, kTuring>();
}  // namespace fastmqa
