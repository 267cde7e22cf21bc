// SPDX-License-Identifier: MIT
//
// How an adaptor refuses, inside; each ends these exceptions where its framework calls it.
#pragma once

#include <fastmqa/attention.h>

#include <stdexcept>

namespace fastmqa::op {

// What was given, what is accepted, what to do.
struct Refusal : std::runtime_error {
  using runtime_error::runtime_error;
};

[[noreturn, gnu::format(printf, 1, 2)]] void refuse(const char* format, ...);

// Refuses what the kernels refuse.
void require(const Status& status);

}  // namespace fastmqa::op
