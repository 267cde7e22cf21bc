// SPDX-License-Identifier: MIT
#pragma once

#include <utility>

#include "attention.cuh"
#include "registry.h"

namespace fastmqa {

// Compiles the rows of kVariants with this type, head sizes and generation, and enters them.
template <DType kDType, int kD, int kV, int kMinSm>
bool instantiate() {
  const auto enter = [](auto index) {
    constexpr Variant kVariant = kVariants[index];
    if constexpr (kVariant.dtype == kDType && kVariant.min_sm == kMinSm &&
                  kVariant.tile.head_size == kD && kVariant.tile.v_head_size == kV) {
      registry().attention[index] = &attention_kernel<index>;
      registry().shared_bytes[index] = sizeof(typename Traits<kVariant>::SharedStorage);
    }
  };
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    (enter(std::integral_constant<int, kIndex>{}), ...);
  }(std::make_integer_sequence<int, kVariantCount>{});
  return true;
}

}  // namespace fastmqa
