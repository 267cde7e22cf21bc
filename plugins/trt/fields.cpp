// SPDX-License-Identifier: MIT
#include "fields.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "../op/refusal.h"

namespace fastmqa::trt {
namespace {

using nvinfer1::TensorRTPhase;
using op::refuse;

// Attributes of the node that are meant for TensorRT's parser.
constexpr const char* kForParser[] = {"plugin_namespace", "plugin_version"};

bool expected(const Field& field, TensorRTPhase phase) {
  return phase == TensorRTPhase::kRUNTIME || field.presence != Presence::kInEngine;
}

bool is_for_parser(const char* name) {
  return std::any_of(std::begin(kForParser), std::end(kForParser),
                     [&](const char* known) { return std::strcmp(name, known) == 0; });
}

std::string names_for(TensorRTPhase phase) {
  std::string names;
  for (const Field& field : kFields) {
    if (!expected(field, phase)) continue;
    names.append(names.empty() ? "" : ", ").append(field.name);
  }
  return names;
}

void read(const PluginField& given, const Field& field, Settings& settings) {
  if (given.type != field.type) {
    refuse("field %s is of type %s; it must be %s", field.name, name_of(given.type),
           name_of(field.type));
  }
  if (given.length != 1 || given.data == nullptr) {
    refuse("field %s has %d values%s; it must have one", field.name, given.length,
           given.data == nullptr ? " at a null pointer" : "");
  }
  std::memcpy(field.place(settings), given.data, field.bytes);
}

void check_engine(const Settings& settings) {
  if (settings.op_version != op::kVersion) {
    refuse(
        "the engine holds version %d of the op and this plugin has version %s; build the engine "
        "with this plugin, or load the plugin that it was built with",
        settings.op_version, kPluginVersion);
  }
  if (settings.sm_count < 1 || settings.shared_bytes < 1) {
    refuse("sm_count=%d, shared_bytes=%d describe no GPU; the engine is damaged, build it anew",
           settings.sm_count, settings.shared_bytes);
  }
}

}  // namespace

std::vector<PluginField> fields_of_node() {
  std::vector<PluginField> fields;
  for (const Field& field : kFields) {
    if (expected(field, TensorRTPhase::kBUILD)) {
      fields.emplace_back(field.name, nullptr, field.type, 1);
    }
  }
  return fields;
}

std::vector<PluginField> fields_of_engine(Settings& settings) {
  std::vector<PluginField> fields;
  for (const Field& field : kFields) {
    fields.emplace_back(field.name, field.place(settings), field.type, 1);
  }
  return fields;
}

Settings parse_fields(const PluginFieldCollection* given, TensorRTPhase phase) {
  if (given == nullptr || given->nbFields < 0 ||
      (given->nbFields > 0 && given->fields == nullptr)) {
    refuse("there is no list of fields");
  }
  const bool in_engine = phase == TensorRTPhase::kRUNTIME;
  Settings settings;
  std::array<bool, kFields.size()> found{};
  for (const PluginField* one = given->fields; one != given->fields + given->nbFields; ++one) {
    if (one->name == nullptr) refuse("a field has no name");
    if (!in_engine && is_for_parser(one->name)) continue;
    const auto field = std::find_if(kFields.begin(), kFields.end(), [&](const Field& known) {
      return expected(known, phase) && std::strcmp(known.name, one->name) == 0;
    });
    if (field == kFields.end()) {
      refuse("field %.64s is unknown; %s has %s", one->name, in_engine ? "an engine" : "a node",
             names_for(phase).c_str());
    }
    bool& is_found = found[static_cast<size_t>(field - kFields.begin())];
    if (is_found) refuse("field %s is given twice", field->name);
    is_found = true;
    read(*one, *field, settings);
  }
  for (size_t i = 0; i < kFields.size(); ++i) {
    const bool required = in_engine || kFields[i].presence == Presence::kRequired;
    if (required && !found[i]) {
      refuse("field %s is missing%s", kFields[i].name,
             in_engine ? "; the engine was built by another plugin: build it anew" : "");
    }
  }
  if (in_engine) check_engine(settings);
  op::check_attributes(settings);
  return settings;
}

std::string describe(const Settings& settings) {
  Settings copy = settings;
  std::string text;
  for (const Field& field : kFields) {
    if (field.presence == Presence::kInEngine) continue;
    char value[32];
    if (field.type == PluginFieldType::kFLOAT32) {  // nine digits tell all floats apart
      std::snprintf(value, sizeof value, "%.9g", *static_cast<float*>(field.place(copy)));
    } else {
      std::snprintf(value, sizeof value, "%d", *static_cast<int32_t*>(field.place(copy)));
    }
    text.append(text.empty() ? "" : " ").append(field.name).append("=").append(value);
  }
  return text;
}

}  // namespace fastmqa::trt
