// SPDX-License-Identifier: MIT
// Continues a prompt of token ids with an engine of `fastmqa-export build`: one prefill, then one
// token after the other. The KV cache stays where it is on the GPU: each past_key_values.* and its
// present.* are bound to one buffer, for the contexts of both profiles.

#include <NvInfer.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr int kNewTokens = 16;
constexpr int kPrefill = 0, kDecode = 1;  // the engine's profiles

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "Error: %s\n", message.c_str());
  std::exit(1);
}

void require(bool holds, const std::string& message) {
  if (!holds) fail(message);
}

void check(cudaError_t status, const char* what) {
  require(status == cudaSuccess, std::string(what) + ": " + cudaGetErrorString(status));
}

class Log : public nvinfer1::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kERROR) std::fprintf(stderr, "TensorRT: %s\n", message);
  }
};

struct CudaFree {
  void operator()(void* memory) const { cudaFree(memory); }
};
using Buffer = std::unique_ptr<void, CudaFree>;

Buffer allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "cannot allocate GPU memory");
  check(cudaMemset(memory, 0, bytes), "cannot clear GPU memory");
  return Buffer(memory);
}

size_t bytes_of(DataType type) {
  switch (type) {
    case DataType::kINT64:
      return 8;
    case DataType::kFLOAT:
      return 4;
    case DataType::kHALF:
    case DataType::kBF16:
      return 2;
    default:
      fail("the engine has a type that exported files do not have");
  }
}

// Batch 1 where the engine leaves it open.
Dims with_batch_1(Dims shape) {
  shape.d[0] = 1;
  return shape;
}

size_t volume(const Dims& shape) {
  size_t product = 1;
  for (int i = 0; i < shape.nbDims; ++i) product *= static_cast<size_t>(shape.d[i]);
  return product;
}

template <typename T>
int64_t argmax(const std::vector<char>& row) {
  const T* values = reinterpret_cast<const T*>(row.data());
  const auto less = [](T a, T b) { return static_cast<float>(a) < static_cast<float>(b); };
  return std::max_element(values, values + row.size() / sizeof(T), less) - values;
}

class Generator {
 public:
  explicit Generator(nvinfer1::ICudaEngine& engine) : engine_(engine) {
    require(engine.getNbOptimizationProfiles() == 2, "the engine has no KV cache");
    check(cudaStreamCreate(&stream_), "cannot create a CUDA stream");
    for (int i = 0; i < engine.getNbIOTensors(); ++i) sort_in(engine.getIOTensorName(i));
    require(!tokens_.empty() && !logits_.empty() && !caches_.empty(),
            "the engine is not that of a language model with a static KV cache");
    capacity_ = engine.getTensorShape(caches_.begin()->first.c_str()).d[2];
    longest_ =
        engine.getProfileShape(tokens_.c_str(), kPrefill, nvinfer1::OptProfileSelector::kMAX).d[1];
    vocabulary_ = engine.getTensorShape(logits_.c_str()).d[2];
    logits_type_ = engine.getTensorDataType(logits_.c_str());
    tokens_buffer_ = allocate(longest_ * sizeof(int64_t));
    position_buffer_ = allocate(sizeof(int64_t));
    logits_buffer_ = allocate(longest_ * vocabulary_ * bytes_of(logits_type_));
    for (int profile : {kPrefill, kDecode}) contexts_[profile] = create_context(profile);
  }

  ~Generator() {
    contexts_ = {};
    cudaStreamDestroy(stream_);
  }

  Generator(const Generator&) = delete;
  Generator& operator=(const Generator&) = delete;

  // Feeds tokens after those that are cached; the likeliest next one.
  int64_t step(const std::vector<int64_t>& tokens) {
    const int64_t count = static_cast<int64_t>(tokens.size());
    require(count <= longest_, "the engine takes prompts of " + std::to_string(longest_) +
                                   " tokens; build it with a larger --max-sequence");
    require(position_ + count <= capacity_, "the KV cache of " + std::to_string(capacity_) +
                                                " tokens is full; build the engine with a larger "
                                                "--capacity");
    nvinfer1::IExecutionContext& context = *contexts_[count == 1 ? kDecode : kPrefill];
    Dims shape{2, {1, count}};
    require(context.setInputShape(tokens_.c_str(), shape),
            "the engine refuses the prompt's length");
    copy(tokens_buffer_.get(), tokens.data(), count * sizeof(int64_t), cudaMemcpyHostToDevice);
    copy(position_buffer_.get(), &position_, sizeof(int64_t), cudaMemcpyHostToDevice);
    require(context.enqueueV3(stream_), "the engine cannot be run");
    std::vector<char> row(vocabulary_ * bytes_of(logits_type_));
    const char* last = static_cast<char*>(logits_buffer_.get()) + (count - 1) * row.size();
    copy(row.data(), last, row.size(), cudaMemcpyDeviceToHost);
    check(cudaStreamSynchronize(stream_), "the engine failed");
    position_ += count;
    if (logits_type_ == DataType::kHALF) return argmax<__half>(row);
    if (logits_type_ == DataType::kBF16) return argmax<__nv_bfloat16>(row);
    return argmax<float>(row);
  }

 private:
  void sort_in(const std::string& name) {
    const bool is_input = engine_.getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kINPUT;
    if (name.rfind("past_key_values.", 0) == 0) {
      const Dims shape = with_batch_1(engine_.getTensorShape(name.c_str()));
      require(shape.d[2] > 0,
              "the capacity of the KV cache is not fixed; use fastmqa-export build");
      caches_[name] = allocate(volume(shape) * bytes_of(engine_.getTensorDataType(name.c_str())));
    } else if (is_input && name != "position") {
      require(engine_.getTensorDataType(name.c_str()) == DataType::kINT64,
              "the input " + name + " holds no token ids");
      tokens_ = name;
    } else if (!is_input && name.rfind("present.", 0) != 0) {
      logits_ = name;
    }
  }

  std::unique_ptr<nvinfer1::IExecutionContext> create_context(int profile) {
    std::unique_ptr<nvinfer1::IExecutionContext> context(engine_.createExecutionContext());
    require(context && context->setOptimizationProfileAsync(profile, stream_),
            "no execution context for profile " + std::to_string(profile));
    bool is_bound = context->setTensorAddress(tokens_.c_str(), tokens_buffer_.get()) &&
                    context->setTensorAddress("position", position_buffer_.get()) &&
                    context->setTensorAddress(logits_.c_str(), logits_buffer_.get()) &&
                    context->setInputShape("position", Dims{1, {1}});
    for (const auto& [past, buffer] : caches_) {
      const std::string present = "present." + past.substr(std::string("past_key_values.").size());
      const Dims shape = with_batch_1(engine_.getTensorShape(past.c_str()));
      is_bound = is_bound && context->setInputShape(past.c_str(), shape) &&
                 context->setTensorAddress(past.c_str(), buffer.get()) &&
                 context->setTensorAddress(present.c_str(), buffer.get());
    }
    require(is_bound, "the engine refuses its buffers");
    return context;
  }

  void copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    check(cudaMemcpyAsync(to, from, bytes, kind, stream_), "cannot copy");
  }

  nvinfer1::ICudaEngine& engine_;
  cudaStream_t stream_ = nullptr;
  std::string tokens_, logits_;
  std::map<std::string, Buffer> caches_;  // by the name of the input
  Buffer tokens_buffer_, position_buffer_, logits_buffer_;
  std::array<std::unique_ptr<nvinfer1::IExecutionContext>, 2> contexts_;
  int64_t position_ = 0, capacity_ = 0, longest_ = 0, vocabulary_ = 0;
  DataType logits_type_ = DataType::kFLOAT;
};

std::vector<char> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  require(file.good(), std::string("cannot read ") + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "Usage: %s MODEL.plan LIBFASTMQA_TRT.so TOKEN...\n", argv[0]);
    return 2;
  }
  std::vector<int64_t> tokens;
  for (int i = 3; i < argc; ++i) {
    char* end = nullptr;
    tokens.push_back(std::strtoll(argv[i], &end, 10));
    require(*argv[i] && !*end, std::string(argv[i]) + " is no token id");
  }
  const std::vector<char> plan = read(argv[1]);
  Log log;
  std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(log));
  require(runtime != nullptr, "TensorRT cannot start");
  // What counts is the creator: a library that registered itself gives no handle.
  nvinfer1::IPluginRegistry& registry = runtime->getPluginRegistry();
  registry.loadLibrary(argv[2]);
  require(registry.getCreator("FusedAttention", "1", "fastmqa") != nullptr,
          std::string("no fastmqa::FusedAttention in ") + argv[2]);
  std::unique_ptr<nvinfer1::ICudaEngine> engine(
      runtime->deserializeCudaEngine(plan.data(), plan.size()));
  require(engine != nullptr, std::string("TensorRT refuses ") + argv[1]);
  Generator generator(*engine);
  for (int i = 0; i < kNewTokens; ++i) {
    tokens = {generator.step(tokens)};
    std::printf("%lld%c", static_cast<long long>(tokens[0]), i + 1 < kNewTokens ? ' ' : '\n');
  }
}
