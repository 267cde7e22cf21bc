// SPDX-License-Identifier: MIT
//
// What the library is, as JSON in a section of its own: `fastmqa-export inspect` and `doctor` read
// it from the file, without TensorRT and without running any of it.
#include <NvInferVersion.h>

#include <array>
#include <cstddef>
#include <string_view>

#include "fields.h"

namespace fastmqa::trt {
namespace {

// Filled by the compiler, which also refuses what does not fit; what is left over stays NUL.
struct Json {
  std::array<char, 1024> text{};
  size_t size = 0;

  constexpr void add(std::string_view part) {
    for (const char c : part) text.at(size++) = c;
  }

  constexpr void add(int number) {
    if (number >= 10) add(number / 10);
    text.at(size++) = static_cast<char>('0' + number % 10);
  }

  constexpr void add_member(std::string_view key, std::string_view value) {
    if (text.at(size - 1) != '{') add(", ");
    add("\"");
    add(key);
    add("\": \"");
    add(value);
    add("\"");
  }
};

constexpr Json describe_library() {
  Json json;
  json.add("{");
  json.add_member("name", op::kName);
  json.add_member("version", kPluginVersion);
  json.add_member("namespace", op::kDomain);
  json.add(", \"tensorrt\": \"");
  json.add(NV_TENSORRT_MAJOR);
  json.add(".");
  json.add(NV_TENSORRT_MINOR);
  json.add(".");
  json.add(NV_TENSORRT_PATCH);
  json.add("\", \"fields\": {");
  for (const Field& field : kFields) {
    if (field.presence != Presence::kInEngine) json.add_member(field.name, name_of(field.type));
  }
  json.add("}}");
  return json;
}

// Nothing refers to it, so the compiler and the linker are told to keep it.
[[gnu::section(".fastmqa_facts"), gnu::used, gnu::retain]] constexpr auto kFactSheet =
    describe_library().text;

}  // namespace
}  // namespace fastmqa::trt
