// SPDX-License-Identifier: MIT
//
// The custom op's CUDA provider, linked with the emulated kernels in the place of the GPU's. It
// calls itself the CPU's and answers the op's calls for a stream and for scratch memory, so that
// any onnxruntime runs it; or, for an onnxruntime whose CUDA is that of cuda_provider.py, stands
// aside.
#include <fastmqa/attention.h>
#include <onnxruntime_cxx_api.h>

#include <cstring>

#include "../../plugins/ort/provider.h"

// register.cpp's, which was compiled under this name.
extern "C" OrtStatus* RegisterForCuda(OrtSessionOptions* options, const OrtApiBase* base);

namespace {

fastmqa::Device device{};
size_t scratch_bytes = 0;     // asked for since it was last told
bool memory_is_full = false;  // from now on
bool stands_aside = false;
char stream;  // an address that no other stream has

const OrtApiBase* onnxruntime;
const OrtApi* real;
OrtApi api;

OrtStatusPtr ORT_API_CALL scratch_buffer(const OrtKernelContext* context, const OrtMemoryInfo* info,
                                         size_t bytes, void** memory) noexcept {
  if (memory_is_full) return real->CreateStatus(ORT_FAIL, "the GPU's memory is full");
  OrtAllocator* allocator = nullptr;
  if (OrtStatus* status = real->KernelContext_GetAllocator(context, info, &allocator)) {
    return status;
  }
  *memory = allocator->Alloc(allocator, bytes);
  std::memset(*memory, 0xFF, bytes);  // NaN
  scratch_bytes += bytes;
  real->ReleaseAllocator(allocator);
  return nullptr;
}

OrtStatusPtr ORT_API_CALL gpu_compute_stream(const OrtKernelContext*, void** out) noexcept {
  *out = &stream;
  return nullptr;
}

const OrtApi* ORT_API_CALL get_api(uint32_t version) noexcept {
  real = onnxruntime->GetApi(version);
  api = *real;
  api.KernelContext_GetScratchBuffer = &scratch_buffer;
  api.KernelContext_GetGPUComputeStream = &gpu_compute_stream;
  return &api;
}

}  // namespace

// Hidden, unlike those of the emulated kernels' library, which this one is linked with.
namespace fastmqa {

Status query_device(int, Device* found) {
  if (device.sm == 0) return {Code::kCudaError, "CUDA device 0: no CUDA-capable device"};
  *found = device;
  return {Code::kOk, ""};
}

Status run(const AttentionParams& params, const Device& used, CUstream_st* given, int32_t tactic) {
  if (stands_aside ? given == nullptr : reinterpret_cast<char*>(given) != &stream) {
    return {Code::kInvalid, "this is not the stream of onnxruntime's run"};
  }
  Status status{};
  status.code = static_cast<Code>(
      fastmqa_run(&params, &used, tactic, given, status.text, sizeof status.text));
  return status;
}

}  // namespace fastmqa

#define FASTMQA_EXPORT extern "C" [[gnu::visibility("default")]]

FASTMQA_EXPORT void set_device(const fastmqa::Device* given) { device = *given; }
FASTMQA_EXPORT void set_memory_full(bool full) { memory_is_full = full; }
FASTMQA_EXPORT void stand_aside() { stands_aside = true; }

// Bytes of scratch memory that were asked for since the last call.
FASTMQA_EXPORT size_t take_scratch_bytes() {
  const size_t bytes = scratch_bytes;
  scratch_bytes = 0;
  return bytes;
}

FASTMQA_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                         const OrtApiBase* base) {
  if (stands_aside) return RegisterForCuda(options, base);
  onnxruntime = base;
  for (fastmqa::ort::Provider& provider : fastmqa::ort::providers()) {
    provider.name = "CPUExecutionProvider";
  }
  static const OrtApiBase between{&get_api, base->GetVersionString};
  return RegisterForCuda(options, &between);
}
