// SPDX-License-Identifier: MIT
//
// What TensorRT does with a plugin, as C functions for ctypes, with the plugin's own sources: each
// makes one call. Stands in for TensorRT's logger and expression builder, and for the CUDA device.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <fastmqa/attention.h>

#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <string>
#include <utility>

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t&);
extern "C" void setLoggerFinder(ILoggerFinder*);

namespace {

fastmqa::Device device{};  // SM 0: there is none

class Log : public ILogger, public ILoggerFinder {
 public:
  void log(Severity severity, const char* text) noexcept override {
    lines += severity == Severity::kERROR ? "error: " : "warning: ";
    lines += text;
    lines += '\n';
  }
  ILogger* findLogger() override { return this; }

  std::string lines;
};

Log logged;

// A dimension is its size or, if that is only known when the engine runs, a symbol: a number below
// 0. Sizes are asked for by the same number.
class Dimension : public IDimensionExpr {
 public:
  explicit Dimension(int64_t value) : answers_(value) { mImpl = &answers_; }

 private:
  struct Answers : apiv::VDimensionExpr {
    explicit Answers(int64_t value) : value(value) {}
    bool isConstant() const override { return value >= 0; }
    int64_t getConstantValue() const override {
      return value >= 0 ? value : std::numeric_limits<int64_t>::min();
    }
    bool isSizeTensor() const override { return false; }
    int64_t value;
  } answers_;
};

// Keeps every expression that it made. The plugin needs no operations.
class Builder : public IExprBuilder {
 public:
  Builder() : answers_(*this) { mImpl = &answers_; }

  const IDimensionExpr* of(int64_t number) {
    const IDimensionExpr* made = &made_.emplace_back(number);
    numbers_[made] = number;
    return made;
  }
  int64_t number_of(const IDimensionExpr* expression) const { return numbers_.at(expression); }

 private:
  struct Answers : apiv::VExprBuilder {
    explicit Answers(Builder& builder) : builder(builder) {}
    const IDimensionExpr* constant(int64_t value) override { return builder.of(value); }
    const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&,
                                    const IDimensionExpr&) override {
      return nullptr;
    }
    const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&,
                                            const IDimensionExpr&) override {
      return nullptr;
    }
    Builder& builder;
  } answers_;
  std::deque<Dimension> made_;
  std::map<const IDimensionExpr*, int64_t> numbers_;
};

IPluginCreatorV3One& creator() {
  int32_t count = 0;
  return static_cast<IPluginCreatorV3One&>(*getCreators(count)[0]);
}

IPluginV3OneCore& core(IPluginV3* plugin) {
  return *static_cast<IPluginV3OneCore*>(
      plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
}

IPluginV3OneBuild& build(IPluginV3* plugin) {
  return *static_cast<IPluginV3OneBuild*>(
      plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
}

IPluginV3OneRuntime& runtime(IPluginV3* plugin) {
  return *static_cast<IPluginV3OneRuntime*>(
      plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

}  // namespace

// In the place of the CUDA runtime and of the kernels' own.
extern "C" cudaError_t CUDARTAPI cudaGetDevice(int* ordinal) {
  *ordinal = 0;
  return device.sm == 0 ? cudaErrorNoDevice : cudaSuccess;
}

extern "C" const char* CUDARTAPI cudaGetErrorString(cudaError_t) { return "no device"; }

fastmqa::Status fastmqa::query_device(int, Device* found) {
  *found = device;
  return {Code::kOk, ""};
}

extern "C" {

void driver_set_device(const fastmqa::Device* given) { device = *given; }

// Whether the plugin is given a logger as by a TensorRT that loads it itself.
void driver_give_logger(bool given) { setLoggerFinder(given ? &logged : nullptr); }

// Takes what was logged since; returns its bytes, of which it writes as many as fit.
size_t driver_take_log(char* text, size_t bytes) {
  const std::string lines = std::exchange(logged.lines, "");
  std::strncpy(text, lines.c_str(), bytes);
  return lines.size();
}

// Sizes of what crosses this boundary, to compare with Python's.
size_t driver_size_of(int32_t number) {
  constexpr size_t kSizes[] = {sizeof(PluginField), sizeof(PluginFieldCollection), sizeof(Dims),
                               sizeof(PluginTensorDesc), sizeof(DynamicPluginTensorDesc)};
  return kSizes[number];
}

IPluginV3* driver_create(const char* layer, const PluginFieldCollection* fields, int32_t phase) {
  return creator().createPlugin(layer, fields, static_cast<TensorRTPhase>(phase));
}

const PluginFieldCollection* driver_field_names() { return creator().getFieldNames(); }

void driver_destroy(IPluginV3* plugin) { delete plugin; }

IPluginV3* driver_clone(IPluginV3* plugin) { return plugin->clone(); }

const char* driver_name(IPluginV3* plugin, int32_t which) {
  const char* names[] = {core(plugin).getPluginNamespace(), core(plugin).getPluginName(),
                         core(plugin).getPluginVersion(), build(plugin).getTimingCacheID(),
                         build(plugin).getMetadataString()};
  return names[which];
}

int32_t driver_outputs(IPluginV3* plugin) { return build(plugin).getNbOutputs(); }

int32_t driver_output_types(IPluginV3* plugin, DataType* outputs, int32_t output_count,
                            const DataType* inputs, int32_t input_count) {
  return build(plugin).getOutputDataTypes(outputs, output_count, inputs, input_count);
}

// `inputs` and `outputs`: sizes, or symbols below 0.
int32_t driver_output_shapes(IPluginV3* plugin, const Dims* inputs, int32_t input_count,
                             Dims* outputs, int32_t output_count) {
  Builder builder;
  DimsExprs in[8]{}, out[8]{};  // more than any node has
  for (int32_t i = 0; i < input_count; ++i) {
    in[i].nbDims = inputs[i].nbDims;
    for (int32_t j = 0; j < in[i].nbDims; ++j) in[i].d[j] = builder.of(inputs[i].d[j]);
  }
  const int32_t failed =
      build(plugin).getOutputShapes(in, input_count, nullptr, 0, out, output_count, builder);
  for (int32_t i = 0; !failed && i < output_count; ++i) {
    outputs[i].nbDims = out[i].nbDims;
    for (int32_t j = 0; j < out[i].nbDims; ++j) outputs[i].d[j] = builder.number_of(out[i].d[j]);
  }
  return failed;
}

bool driver_supports_format(IPluginV3* plugin, int32_t position,
                            const DynamicPluginTensorDesc* tensors, int32_t input_count,
                            int32_t output_count) {
  return build(plugin).supportsFormatCombination(position, tensors, input_count, output_count);
}

int32_t driver_configure(IPluginV3* plugin, const DynamicPluginTensorDesc* inputs,
                         int32_t input_count, const DynamicPluginTensorDesc* outputs,
                         int32_t output_count) {
  return build(plugin).configurePlugin(inputs, input_count, outputs, output_count);
}

size_t driver_workspace(IPluginV3* plugin, const DynamicPluginTensorDesc* inputs,
                        int32_t input_count, const DynamicPluginTensorDesc* outputs,
                        int32_t output_count) {
  return build(plugin).getWorkspaceSize(inputs, input_count, outputs, output_count);
}

int32_t driver_tactic_count(IPluginV3* plugin) { return build(plugin).getNbTactics(); }

int32_t driver_tactics(IPluginV3* plugin, int32_t* tactics, int32_t count) {
  return build(plugin).getValidTactics(tactics, count);
}

const PluginFieldCollection* driver_serialise(IPluginV3* plugin) {
  return runtime(plugin).getFieldsToSerialize();
}

IPluginV3* driver_attach(IPluginV3* plugin) { return runtime(plugin).attachToContext(nullptr); }

int32_t driver_set_tactic(IPluginV3* plugin, int32_t tactic) {
  return runtime(plugin).setTactic(tactic);
}

int32_t driver_shape_change(IPluginV3* plugin, const PluginTensorDesc* inputs, int32_t input_count,
                            const PluginTensorDesc* outputs, int32_t output_count) {
  return runtime(plugin).onShapeChange(inputs, input_count, outputs, output_count);
}

int32_t driver_enqueue(IPluginV3* plugin, const PluginTensorDesc* input_descs,
                       const PluginTensorDesc* output_descs, const void* const* inputs,
                       void* const* outputs, void* workspace) {
  return runtime(plugin).enqueue(input_descs, output_descs, inputs, outputs, workspace, nullptr);
}

}  // extern "C"
