// SPDX-License-Identifier: MIT
//
// How a call becomes launches: which variant, how many splits. Pure functions of the sizes and the
// device, tested without one (tests/kernels).
#pragma once

#include <fastmqa/attention.h>

#include "params.h"
#include "variants.h"

namespace fastmqa {

struct Plan {
  int variant;  // in kVariants; -1: none covers the call
  KernelParams params;
  unsigned grid;          // blocks of the attention kernel
  unsigned combine_grid;  // blocks of the combine kernel; 0: not needed
};

// The arguments are valid (check.h). `shared_bytes` of each variant, and 0 where it is not built.
Plan make_plan(const AttentionParams& params, const Device& device,
               const std::array<int, kVariantCount>& shared_bytes, int tactic);

// A bound of the workspace of every plan for sizes B, S and T up to these.
size_t bound_of_workspace(const AttentionParams& largest, const Device& device,
                          const std::array<int, kVariantCount>& shared_bytes);

// How many parts to divide the keys into, so that `blocks` blocks per part keep `slots` SMs busy. A
// second block per SM would not read faster: the tiles under way in one are more than the SM's
// share of the bandwidth times the latency. But each part adds its outputs to what is written and
// read.
int choose_splits(int64_t blocks, int64_t slots, int key_tiles);

}  // namespace fastmqa
