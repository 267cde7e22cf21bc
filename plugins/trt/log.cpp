// SPDX-License-Identifier: MIT
#include "log.h"

#include <atomic>
#include <cstdio>

#include "loaded_tensorrt.h"

namespace fastmqa::trt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder = nullptr;

nvinfer1::ILogger* find_logger() {
  if (auto* finder = logger_finder.load()) {
    if (auto* logger = finder->findLogger()) return logger;
  }
  using GetLogger = nvinfer1::ILogger*() noexcept;
  auto* get_logger = reinterpret_cast<GetLogger*>(find_in_tensorrt("getLogger"));
  return get_logger != nullptr ? get_logger() : nullptr;
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept {
  logger_finder = find_in_tensorrt("getLogger") != nullptr ? finder : nullptr;
}

void log(Severity severity, const char* text) noexcept {
  try {
    if (auto* logger = find_logger()) return logger->log(severity, text);
  } catch (...) {  // of findLogger(), which may throw
  }
  std::fprintf(stderr, "%s\n", text);
}

}  // namespace fastmqa::trt
