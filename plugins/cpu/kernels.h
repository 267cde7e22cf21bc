// SPDX-License-Identifier: MIT
//
// The code of one instruction set, of which there are several, and which of them this machine has.
#pragma once

#include <fastmqa/attention.h>

#include <cstdint>

#include "plan.h"

namespace fastmqa::cpu {

struct Kernels {
  const char* name;
  // Computes a unit: its rows of y and lse, or what combine_rows() makes these of.
  void (*run_unit)(const AttentionParams&, const Plan&, const Unit&, const Scratch&);
  // Rows [first, first + count) of a row block whose keys were split; `unit` is any part of it.
  void (*combine_rows)(const AttentionParams&, const Plan&, const Unit& unit, const Scratch&,
                       int32_t first, int32_t count);
};

// The i-th of those that this machine can run, best first; null beyond the last.
const Kernels* available_kernels(int32_t i);

}  // namespace fastmqa::cpu
