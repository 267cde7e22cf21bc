// SPDX-License-Identifier: MIT
//
// How the plugin fails: inside by exceptions, which end here as messages in TensorRT's log.
#pragma once

#include <cstdio>
#include <exception>

#include "../op/contract.h"
#include "log.h"

namespace fastmqa::trt {

// What `body` returns; if it throws, the message goes to the log and `failed` is returned. No
// exception may leave a function that TensorRT calls.
template <class Result, class Body>
Result guard(const char* layer, const char* function, Result failed, Body&& body) noexcept {
  const char* reason = "unknown exception";
  char text[1024];
  const auto say = [&] {
    std::snprintf(text, sizeof text, "%s::%s %s, %s: %s", op::kDomain, op::kName, layer, function,
                  reason);
    log(Severity::kERROR, text);
  };
  try {
    return body();
  } catch (const std::exception& error) {
    reason = error.what();
    say();
  } catch (...) {
    say();
  }
  return failed;
}

}  // namespace fastmqa::trt
