// SPDX-License-Identifier: MIT
// As much of TensorRT's C++ interface as engines/examples/generate.cpp calls, on host memory.
//
// A plan is text: "capacity longest profiles type". The model in it is a sum: each step writes
// its tokens to the cache, and the likeliest next token is one more than the sum of what the cache
// holds up to there, modulo the vocabulary.

#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <string>

namespace nvinfer1 {

constexpr int64_t kVocabulary = 64, kColumns = 8;

enum class DataType { kFLOAT, kHALF, kBF16, kINT32, kINT64 };
enum class TensorIOMode { kINPUT, kOUTPUT };
enum class OptProfileSelector { kMIN, kOPT, kMAX };

struct Dims {
  int32_t nbDims;
  int64_t d[8];
};

class ILogger {
 public:
  enum class Severity { kINTERNAL_ERROR, kERROR, kWARNING };
  virtual void log(Severity severity, const char* message) noexcept = 0;
};

class IExecutionContext {
 public:
  explicit IExecutionContext(int64_t longest, DataType type) : longest_(longest), type_(type) {}

  bool setOptimizationProfileAsync(int profile, void*) {
    profile_ = profile;
    return true;
  }
  bool setInputShape(const char* name, const Dims& shape) {
    shapes_[name] = shape;
    if (std::string(name) != "input_ids") return shape.d[0] == 1;
    return shape.d[1] >= 1 && shape.d[1] <= (profile_ == 1 ? 1 : longest_);
  }
  bool setTensorAddress(const char* name, void* address) {
    addresses_[name] = static_cast<char*>(address);
    return true;
  }
  bool enqueueV3(void*) {
    for (const char* input : {"input_ids", "position", "past_key_values.0.key"}) {
      if (!shapes_.count(input) || !addresses_[input]) return false;
    }
    char* past = addresses_["past_key_values.0.key"];
    if (addresses_["present.0.key"] != past || !addresses_["logits"]) return false;
    const int64_t* tokens = reinterpret_cast<int64_t*>(addresses_["input_ids"]);
    const int64_t position = *reinterpret_cast<int64_t*>(addresses_["position"]);
    const int64_t count = shapes_["input_ids"].d[1];
    float* cache = reinterpret_cast<float*>(past);
    for (int64_t s = 0; s < count; ++s) {
      cache[(position + s) * kColumns] = static_cast<float>(tokens[s]);
      float sum = 1;
      for (int64_t t = 0; t <= position + s; ++t) sum += cache[t * kColumns];
      for (int64_t v = 0; v < kVocabulary; ++v) {
        const float logit = v == static_cast<int64_t>(sum) % kVocabulary ? 2.f : -1.f;
        const int64_t at = s * kVocabulary + v;
        if (type_ == DataType::kHALF) {
          reinterpret_cast<__half*>(addresses_["logits"])[at] = __float2half(logit);
        } else {
          reinterpret_cast<float*>(addresses_["logits"])[at] = logit;
        }
      }
    }
    return true;
  }

 private:
  int64_t longest_;
  DataType type_;
  int profile_ = 0;
  std::map<std::string, Dims> shapes_;
  std::map<std::string, char*> addresses_;
};

class ICudaEngine {
 public:
  explicit ICudaEngine(const std::string& plan) {
    std::string type;
    std::istringstream(plan) >> capacity_ >> longest_ >> profiles_ >> type;
    type_ = type == "half" ? DataType::kHALF : DataType::kFLOAT;
  }

  int getNbOptimizationProfiles() const { return profiles_; }
  int getNbIOTensors() const { return 5; }
  const char* getIOTensorName(int index) const { return kNames[index]; }
  TensorIOMode getTensorIOMode(const std::string& name) const {
    return name == "logits" || name == "present.0.key" ? TensorIOMode::kOUTPUT
                                                       : TensorIOMode::kINPUT;
  }
  DataType getTensorDataType(const std::string& name) const {
    if (name == "input_ids" || name == "position") return DataType::kINT64;
    return name == "logits" ? type_ : DataType::kFLOAT;
  }
  Dims getTensorShape(const std::string& name) const {
    if (name == "position") return {1, {-1}};
    if (name == "input_ids") return {2, {-1, -1}};
    if (name == "logits") return {3, {-1, -1, kVocabulary}};
    return {4, {-1, 1, capacity_, kColumns}};
  }
  Dims getProfileShape(const std::string&, int profile, OptProfileSelector) const {
    return {2, {1, profile == 1 ? 1 : longest_}};
  }
  IExecutionContext* createExecutionContext() { return new IExecutionContext(longest_, type_); }

 private:
  static constexpr const char* kNames[] = {"input_ids", "position", "past_key_values.0.key",
                                           "logits", "present.0.key"};
  int64_t capacity_ = 0, longest_ = 0;
  int profiles_ = 0;
  DataType type_;
};

class IPluginRegistry {
 public:
  void* loadLibrary(const char* path) {
    is_loaded_ = std::string(path).find("fastmqa") != std::string::npos;
    return nullptr;  // as of a library that registered itself
  }
  void* getCreator(const char*, const char*, const char*) { return is_loaded_ ? this : nullptr; }

 private:
  bool is_loaded_ = false;
};

class IRuntime {
 public:
  explicit IRuntime(ILogger& log) : log_(log) {}

  IPluginRegistry& getPluginRegistry() { return registry_; }
  ICudaEngine* deserializeCudaEngine(const void* data, size_t size) {
    const std::string plan(static_cast<const char*>(data), size);
    if (!plan.empty() && plan[0] != 'x') return new ICudaEngine(plan);
    log_.log(ILogger::Severity::kERROR, "Version tag does not match");
    return nullptr;
  }

 private:
  ILogger& log_;
  IPluginRegistry registry_;
};

inline IRuntime* createInferRuntime(ILogger& log) {
  return std::getenv("FAKE_NO_GPU") ? nullptr : new IRuntime(log);
}

}  // namespace nvinfer1
