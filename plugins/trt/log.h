// SPDX-License-Identifier: MIT
//
// Messages to TensorRT's log.
#pragma once

#include <NvInferRuntime.h>

namespace fastmqa::trt {

using Severity = nvinfer1::ILogger::Severity;

// What TensorRT gives a library that it loads itself. One of another major version than this was
// compiled for is not kept: its virtual functions are others.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// To the logger of the engine or builder that called the plugin, else to the process's, else to
// stderr.
void log(Severity severity, const char* text) noexcept;

}  // namespace fastmqa::trt
