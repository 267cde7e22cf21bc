// SPDX-License-Identifier: MIT
//
// What separates one generation of GPUs from another, for code that must know at compile time.
#pragma once

namespace fastmqa {

// Code is written for two generations: 75 runs on Turing, 80 on everything since Ampere.
constexpr int kTuring = 75;
constexpr int kAmpere = 80;

// Whether global memory is copied to shared memory past the registers, by cp.async.
constexpr bool has_async_copy(int sm) { return sm >= kAmpere; }

// Shared memory that a block of every GPU of that generation may have: a T4's, and an A10's or
// L4's.
constexpr int least_shared_bytes(int sm) { return (sm >= kAmpere ? 99 : 64) << 10; }

}  // namespace fastmqa
