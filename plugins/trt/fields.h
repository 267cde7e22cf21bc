// SPDX-License-Identifier: MIT
//
// The plugin's settings as TensorRT's fields: one table, from which the creator's list, parsing,
// serialisation and the plugin's description come.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstddef>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../op/contract.h"

namespace fastmqa::trt {

// TensorRT has names and versions as text.
inline constexpr char kPluginVersion[] = "1";
static_assert(kPluginVersion[0] == '0' + op::kVersion);

struct Settings : op::Attributes {
  // In an engine only: what it was built with, and on which GPU. An engine that runs on a larger
  // one may not divide its work further than its workspace allows.
  int32_t op_version = op::kVersion;
  int32_t sm_count = 0;
  int32_t shared_bytes = 0;
};

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

enum class Presence {
  kRequired,
  kOptional,
  kInEngine,  // not of the node: only what an engine stores
};

struct Field {
  const char* name;
  PluginFieldType type;
  size_t bytes;
  Presence presence;
  void* (*place)(Settings&);
};

// A C++ type without a specialisation cannot be a field.
template <class T>
struct FieldTypeOf;
template <>
struct FieldTypeOf<float> {
  static constexpr PluginFieldType kType = PluginFieldType::kFLOAT32;
};
template <>
struct FieldTypeOf<int32_t> {
  static constexpr PluginFieldType kType = PluginFieldType::kINT32;
};

template <auto kMember>
constexpr Field field(const char* name, Presence presence) {
  using T = std::remove_reference_t<decltype(std::declval<Settings&>().*kMember)>;
  return {name, FieldTypeOf<T>::kType, sizeof(T), presence,
          [](Settings& settings) -> void* { return &(settings.*kMember); }};
}

inline constexpr std::array kFields{
    field<&Settings::scale>("scale", Presence::kRequired),
    field<&Settings::is_causal>("is_causal", Presence::kOptional),
    field<&Settings::window_left>("window_left", Presence::kOptional),
    field<&Settings::window_right>("window_right", Presence::kOptional),
    field<&Settings::softcap>("softcap", Presence::kOptional),
    field<&Settings::softmax_precision>("softmax_precision", Presence::kOptional),
    field<&Settings::v_head_size>("v_head_size", Presence::kOptional),
    field<&Settings::layout>("layout", Presence::kOptional),
    field<&Settings::features>("features", Presence::kOptional),
    field<&Settings::op_version>("op_version", Presence::kInEngine),
    field<&Settings::sm_count>("sm_count", Presence::kInEngine),
    field<&Settings::shared_bytes>("shared_bytes", Presence::kInEngine),
};

constexpr const char* name_of(PluginFieldType type) {
  switch (type) {
    case PluginFieldType::kFLOAT16:
      return "FLOAT16";
    case PluginFieldType::kFLOAT32:
      return "FLOAT32";
    case PluginFieldType::kFLOAT64:
      return "FLOAT64";
    case PluginFieldType::kINT8:
      return "INT8";
    case PluginFieldType::kINT16:
      return "INT16";
    case PluginFieldType::kINT32:
      return "INT32";
    case PluginFieldType::kINT64:
      return "INT64";
    case PluginFieldType::kCHAR:
      return "CHAR";
    case PluginFieldType::kDIMS:
      return "DIMS";
    case PluginFieldType::kBF16:
      return "BF16";
    default:
      return "unknown";
  }
}

// What the creator says that a node has; without data.
std::vector<PluginField> fields_of_node();

// All fields, with data in `settings`, which must outlive them.
std::vector<PluginField> fields_of_engine(Settings& settings);

// The settings that a node (kBUILD) or an engine (kRUNTIME) gives, already checked.
Settings parse_fields(const PluginFieldCollection* given, nvinfer1::TensorRTPhase phase);

// The node's attributes as text: equal exactly if they are.
std::string describe(const Settings& settings);

}  // namespace fastmqa::trt
