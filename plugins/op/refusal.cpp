// SPDX-License-Identifier: MIT
#include "refusal.h"

#include <cstdarg>
#include <cstdio>

namespace fastmqa::op {

void refuse(const char* format, ...) {
  char text[768];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Refusal(text);
}

void require(const Status& status) {
  if (status.code != Code::kOk) throw Refusal(status.text);
}

}  // namespace fastmqa::op
