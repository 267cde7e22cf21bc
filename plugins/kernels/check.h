// SPDX-License-Identifier: MIT
//
// Refuses arguments that contradict the contract, before anything is launched.
#pragma once

#include <fastmqa/attention.h>

namespace fastmqa {

Status ok();
[[gnu::format(printf, 2, 3)]] Status failure(Code code, const char* format, ...);

// Sizes, types and attributes; not pointers and strides.
Status check_sizes(const AttentionParams& params);

// Pointers and strides: present where needed, aligned, in range.
Status check_memory(const AttentionParams& params);

const char* name_of(DType dtype);

// For the C functions: a status as its code, and its text where the caller wants it.
int32_t report(const Status& status, char* text, size_t text_bytes);

}  // namespace fastmqa
