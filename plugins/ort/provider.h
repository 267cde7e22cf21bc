// SPDX-License-Identifier: MIT
//
// What differs between execution providers: how a call gets its scratch memory and is started.
#pragma once

#include <fastmqa/attention.h>
#include <onnxruntime_cxx_api.h>

#include <memory>
#include <vector>

namespace fastmqa::ort {

// The kernels of one provider, for one node of a session. Used by concurrent runs.
class Kernels {
 public:
  virtual ~Kernels() = default;

  // `call` has all but its workspace. Throws if it cannot be run.
  virtual void run(const AttentionParams& call, const Ort::KernelContext& context) const = 0;
};

struct Provider {
  const char* name;
  std::unique_ptr<Kernels> (*create)(const OrtKernelInfo* node);
};

// Those that this library was built with. Each file that has one enters it.
inline std::vector<Provider>& providers() {
  static std::vector<Provider> built;
  return built;
}
inline bool enter(const Provider& provider) {
  providers().push_back(provider);
  return true;
}

}  // namespace fastmqa::ort
