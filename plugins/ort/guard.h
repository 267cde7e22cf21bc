// SPDX-License-Identifier: MIT
//
// How the custom op fails: inside by exceptions, which end here as statuses of onnxruntime.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <cstdio>
#include <exception>
#include <string>

#include "../op/contract.h"
#include "../op/refusal.h"

namespace fastmqa::ort {

// Null, or why `body` threw, with the node's name. No exception may leave a function that
// onnxruntime calls.
template <class Body>
OrtStatus* guard(const std::string& node, Body&& body) noexcept {
  const auto failed = [&](OrtErrorCode code, const char* reason) noexcept {
    char text[1024];
    std::snprintf(text, sizeof text, "%s::%s node '%s': %s", op::kDomain, op::kName, node.c_str(),
                  reason);
    return Ort::GetApi().CreateStatus(code, text);
  };
  try {
    body();
    return nullptr;
  } catch (const op::Refusal& error) {
    return failed(ORT_INVALID_ARGUMENT, error.what());
  } catch (const Ort::Exception& error) {
    return failed(error.GetOrtErrorCode(), error.what());
  } catch (const std::exception& error) {
    return failed(ORT_RUNTIME_EXCEPTION, error.what());
  } catch (...) {
    return failed(ORT_RUNTIME_EXCEPTION, "unknown exception");
  }
}

}  // namespace fastmqa::ort
