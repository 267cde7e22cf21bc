// SPDX-License-Identifier: MIT
//
// A library that looks to the plugin like TensorRT: a registry that counts, and the process's log.
#include <NvInferRuntime.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

std::vector<IPluginCreatorInterface*> creators;
int32_t registrations = 0;
std::string lines;

class Log : public ILogger {
  void log(Severity, const char* text) noexcept override { lines += text; }
};

bool is_called(IPluginCreatorInterface* creator, const char* name, const char* version,
               const char* name_space) {
  auto* one = static_cast<IPluginCreatorV3One*>(creator);
  return !std::strcmp(one->getPluginName(), name) &&
         !std::strcmp(one->getPluginVersion(), version) &&
         !std::strcmp(one->getPluginNamespace(), name_space);
}

class Registry : public IPluginRegistry {
 public:
#if NV_TENSORRT_MAJOR < 11
  bool registerCreator(IPluginCreator&, const char*) noexcept override { return false; }
  IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { return nullptr; }
  IPluginCreator* getPluginCreator(const char*, const char*, const char*) noexcept override {
    return nullptr;
  }
  bool deregisterCreator(const IPluginCreator&) noexcept override { return false; }
#endif
  void setErrorRecorder(IErrorRecorder*) noexcept override {}
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool isParentSearchEnabled() const override { return false; }
  void setParentSearchEnabled(bool) override {}
  PluginLibraryHandle loadLibrary(const char*) noexcept override { return nullptr; }
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
  bool registerCreator(IPluginCreatorInterface& creator, const char*) noexcept override {
    creators.push_back(&creator);
    ++registrations;
    return true;
  }
  IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept override {
    *count = static_cast<int32_t>(creators.size());
    return creators.data();
  }
  IPluginCreatorInterface* getCreator(const char* name, const char* version,
                                      const char* name_space) noexcept override {
    const auto found = std::find_if(creators.begin(), creators.end(), [&](auto* creator) {
      return is_called(creator, name, version, name_space);
    });
    return found == creators.end() ? nullptr : *found;
  }
  bool deregisterCreator(const IPluginCreatorInterface& creator) noexcept override {
    return std::erase(creators, &creator) > 0;
  }
  IPluginResource* acquirePluginResource(const char*, IPluginResource*) noexcept override {
    return nullptr;
  }
  int32_t releasePluginResource(const char*) noexcept override { return 1; }
  IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* count) noexcept override {
    return getAllCreators(count);
  }
};

}  // namespace

extern "C" IPluginRegistry* getPluginRegistry() noexcept {
  static Registry registry;
  return &registry;
}

extern "C" ILogger* getLogger() noexcept {
  static Log log;
  return &log;
}

extern "C" const char* logged_by_process() { return lines.c_str(); }
extern "C" int32_t registered_ever() { return registrations; }
extern "C" int32_t registered_now() { return static_cast<int32_t>(creators.size()); }
