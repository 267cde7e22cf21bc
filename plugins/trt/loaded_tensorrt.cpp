// SPDX-License-Identifier: MIT
#include "loaded_tensorrt.h"

#include <NvInferVersion.h>
#include <dlfcn.h>

#include <initializer_list>

#define FASTMQA_TEXT_OF(x) #x
#define FASTMQA_TEXT(x) FASTMQA_TEXT_OF(x)
#define FASTMQA_SONAME(library) library ".so." FASTMQA_TEXT(NV_TENSORRT_MAJOR)

namespace fastmqa::trt {

void* find_in_tensorrt(const char* function) noexcept {
  // By soname, since servers and Python load TensorRT without making its symbols global. The handle
  // is kept: what was found must outlive this library.
  for (const char* name : {FASTMQA_SONAME("libnvinfer"), FASTMQA_SONAME("libnvinfer_lean"),
                           FASTMQA_SONAME("libnvinfer_dispatch")}) {
    if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) {
      if (void* found = dlsym(library, function)) return found;
    }
  }
  return nullptr;
}

}  // namespace fastmqa::trt
