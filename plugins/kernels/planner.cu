// SPDX-License-Identifier: MIT
//
// What describes launches, without the kernels: `fastmqa-export kernels emit` compiles it in
// seconds, together with check.cpp, plan.cpp and describe.cpp. No part of the library.
#include <utility>

#include "call.h"
#include "traits.cuh"

namespace fastmqa {

[[maybe_unused]] static const bool kEntered = [] {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    ((registry().shared_bytes[kIndex] = sizeof(typename Traits<kVariants[kIndex]>::SharedStorage)),
     ...);
  }(std::make_integer_sequence<int, kVariantCount>{});
  return true;
}();

}  // namespace fastmqa

size_t fastmqa_describe_launches(const fastmqa::AttentionParams* params,
                                 const fastmqa::Device* device, int32_t tactic, char* json,
                                 size_t json_bytes) {
  return fastmqa::describe_launches(*params, *device, tactic, json, json_bytes);
}

size_t fastmqa_describe_variants(char* json, size_t json_bytes) {
  return fastmqa::describe_variants(json, json_bytes);
}
