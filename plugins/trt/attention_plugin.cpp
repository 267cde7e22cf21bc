// SPDX-License-Identifier: MIT
#include "attention_plugin.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "../op/call.h"
#include "../op/refusal.h"
#include "guard.h"
#include "tensors.h"

namespace fastmqa::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::PluginCapabilityType;
using nvinfer1::TensorFormat;
using op::refuse;

constexpr int32_t kDone = 0;
constexpr int32_t kFailed = 1;

// TensorRT numbers the outputs anew.
constexpr int32_t kY = op::kY - op::kInputs;
constexpr int32_t kLse = op::kLse - op::kInputs;

// Whether there are kernels for queries of that type, at any head sizes.
Status supports_type(const Settings& settings, DataType q_type, const Device& device) {
  const bool values_in_k = settings.has(op::kFeatureValuesInK);
  const int64_t head_size = values_in_k ? 288 : 64;
  Settings nominal = settings;
  nominal.v_head_size = values_in_k ? 256 : 0;
  nominal.features &= op::kFeatureValuesInK;
  op::Inputs inputs;
  inputs.fill({onnx_type_of(q_type), 4, {1, 1, 1, head_size}});
  return supports(op::describe_call(nominal, inputs), device);
}

// Kernels, workspace and tactics are those of one set of heads.
void check_constant(const AttentionParams& least, const AttentionParams& most) {
  const struct {
    const char* letter;
    int32_t least, most;
  } sizes[] = {{"H", least.heads, most.heads},
               {"Hkv", least.kv_heads, most.kv_heads},
               {"D", least.head_size, most.head_size},
               {"V", least.v_head_size, most.v_head_size}};
  for (const auto& [letter, lower, upper] : sizes) {
    if (lower != upper) {
      refuse("%s goes from %d to %d; only B, S and T may change within a profile", letter, lower,
             upper);
    }
  }
}

}  // namespace

AttentionPlugin::AttentionPlugin(std::string layer, const Settings& settings)
    : layer_(std::move(layer)),
      settings_(settings),
      description_(trt::describe(settings)),
      timing_id_("kernels " FASTMQA_KERNELS_ID ", op " + std::string(kPluginVersion) + ": " +
                 description_) {}

template <class Result, class Body>
Result AttentionPlugin::guarded(const char* function, Result failed, Body&& body) const noexcept {
  return guard(layer_.c_str(), function, failed, body);
}

void AttentionPlugin::check_counts(int32_t input_count, int32_t output_count) const {
  if (input_count != op::kInputs || output_count != getNbOutputs()) {
    refuse("%d inputs and %d outputs; with features=%d it has %d and %d", input_count, output_count,
           settings_.features, op::kInputs, getNbOutputs());
  }
}

const Device& AttentionPlugin::device() const {
  if (device_.sm == 0) {
    int ordinal = 0;
    if (const cudaError_t error = cudaGetDevice(&ordinal)) {
      refuse("there is no CUDA device: %s", cudaGetErrorString(error));
    }
    Device found{};
    op::require(query_device(ordinal, &found));
    if (settings_.sm_count != 0) {
      found.sm_count = std::min(found.sm_count, settings_.sm_count);
      found.shared_bytes = std::min(found.shared_bytes, settings_.shared_bytes);
    }
    device_ = found;
  }
  return device_;
}

// IPluginV3

nvinfer1::IPluginCapability* AttentionPlugin::getCapabilityInterface(
    PluginCapabilityType type) noexcept {
  switch (type) {
    case PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

IPluginV3* AttentionPlugin::clone() noexcept {
  return guarded<IPluginV3*>("clone", nullptr, [&] { return new AttentionPlugin(*this); });
}

// IPluginV3OneBuild

int32_t AttentionPlugin::getNbOutputs() const noexcept {
  return settings_.has(op::kFeatureLse) ? 2 : 1;
}

int32_t AttentionPlugin::getOutputDataTypes(DataType* outputs, int32_t output_count,
                                            const DataType* inputs,
                                            int32_t input_count) const noexcept {
  return guarded("getOutputDataTypes", kFailed, [&] {
    check_counts(input_count, output_count);
    outputs[kY] = inputs[op::kQ];
    if (settings_.has(op::kFeatureLse)) outputs[kLse] = DataType::kFLOAT;
    return kDone;
  });
}

int32_t AttentionPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                                         const nvinfer1::DimsExprs* /*shape_inputs*/,
                                         int32_t /*shape_input_count*/,
                                         nvinfer1::DimsExprs* outputs, int32_t output_count,
                                         nvinfer1::IExprBuilder& builder) noexcept {
  return guarded("getOutputShapes", kFailed, [&] {
    check_counts(input_count, output_count);
    const nvinfer1::DimsExprs &q = inputs[op::kQ], &v = inputs[op::kV];
    const bool values_in_k = settings_.has(op::kFeatureValuesInK);
    if (q.nbDims != 4 || (!values_in_k && v.nbDims != 4)) {
      refuse("q has %d dimensions and v has %d; both must have 4", q.nbDims, v.nbDims);
    }
    outputs[kY] = q;
    outputs[kY].d[3] = values_in_k ? builder.constant(settings_.v_head_size) : v.d[3];
    if (settings_.has(op::kFeatureLse)) {
      const bool rows_first = settings_.rows_first();
      outputs[kLse] = {3, {q.d[0], q.d[rows_first ? 2 : 1], q.d[rows_first ? 1 : 2]}};
    }
    return kDone;
  });
}

bool AttentionPlugin::supportsFormatCombination(int32_t position,
                                                const DynamicPluginTensorDesc* tensors,
                                                int32_t input_count,
                                                int32_t output_count) noexcept {
  return guarded("supportsFormatCombination", false, [&] {
    check_counts(input_count, output_count);
    const PluginTensorDesc& asked = tensors[position].desc;
    if (asked.format != TensorFormat::kLINEAR || !is_type_accepted(position, tensors)) return false;
    if (position != op::kQ) return true;
    const Status status = supports_type(settings_, asked.type, device());
    if (status.code != Code::kOk) log(Severity::kWARNING, status.text);
    return status.code == Code::kOk;
  });
}

int32_t AttentionPlugin::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                         const DynamicPluginTensorDesc* outputs,
                                         int32_t output_count) noexcept {
  return guarded("configurePlugin", kFailed, [&] {
    tactics_.clear();
    check_counts(input_count, output_count);
    for (int32_t i = 0; i < input_count + output_count; ++i) {
      const auto& tensor = i < input_count ? inputs[i] : outputs[i - input_count];
      if (tensor.desc.format != TensorFormat::kLINEAR) {
        refuse("%s is not in linear format", op::kTensorNames[i]);
      }
    }
    op::check_inputs(settings_, describe(inputs));
    const auto call_at = [&](Dims DynamicPluginTensorDesc::* end) {
      const AttentionParams call = op::describe_call(settings_, describe(inputs, end));
      op::require(supports(call, device()));
      return call;
    };
    check_constant(call_at(&DynamicPluginTensorDesc::min), call_at(&DynamicPluginTensorDesc::max));
    int32_t distinct[kTactics + 1];
    const int32_t count =
        distinct_tactics(call_at(&DynamicPluginTensorDesc::opt), device(), distinct);
    for (int32_t i = 0; i < count; ++i) tactics_.push_back(distinct[i] + 1);
    return kDone;
  });
}

size_t AttentionPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                         const DynamicPluginTensorDesc* /*outputs*/,
                                         int32_t output_count) const noexcept {
  // Sizes for which this fails were refused by configurePlugin().
  return guarded("getWorkspaceSize", size_t{0}, [&] {
    check_counts(input_count, output_count);
    const op::Inputs largest = describe(inputs, &DynamicPluginTensorDesc::max);
    return workspace_bound(op::describe_call(settings_, largest), device());
  });
}

int32_t AttentionPlugin::getValidTactics(int32_t* tactics, int32_t count) noexcept {
  return guarded("getValidTactics", kFailed, [&] {
    if (count != getNbTactics()) refuse("%d tactics asked for, of %d", count, getNbTactics());
    std::copy(tactics_.begin(), tactics_.end(), tactics);
    return kDone;
  });
}

// IPluginV3OneRuntime

IPluginV3* AttentionPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  return guarded<IPluginV3*>("attachToContext", nullptr, [&] {
    auto attached = std::make_unique<AttentionPlugin>(*this);
    attached->device_ = {};
    attached->device();  // so that enqueue() asks the driver nothing
    return attached.release();
  });
}

int32_t AttentionPlugin::setTactic(int32_t tactic) noexcept {
  return guarded("setTactic", kFailed, [&] {
    if (tactic < 0 || tactic > kTactics + 1) {
      refuse("tactic %d; there are 1 to %d, and 0 for the default", tactic, kTactics + 1);
    }
    tactic_ = std::max(tactic - 1, 0);
    return kDone;
  });
}

int32_t AttentionPlugin::onShapeChange(const PluginTensorDesc* inputs, int32_t input_count,
                                       const PluginTensorDesc* /*outputs*/,
                                       int32_t output_count) noexcept {
  return guarded("onShapeChange", kFailed, [&] {
    call_ = {};  // run() refuses it, should this fail
    check_counts(input_count, output_count);
    const op::Inputs described = describe(inputs);
    op::check_inputs(settings_, described);
    call_ = op::describe_call(settings_, described);
    return kDone;
  });
}

int32_t AttentionPlugin::enqueue(const PluginTensorDesc*, const PluginTensorDesc*,
                                 const void* const* inputs, void* const* outputs, void* workspace,
                                 cudaStream_t stream) noexcept {
  return guarded("enqueue", kFailed, [&] {
    AttentionParams call = call_;
    op::set_inputs(settings_, inputs, call);
    call.y = outputs[kY];
    call.lse = settings_.has(op::kFeatureLse) ? static_cast<float*>(outputs[kLse]) : nullptr;
    call.workspace = workspace;
    op::require(run(call, device(), stream, tactic_));
    return kDone;
  });
}

const PluginFieldCollection* AttentionPlugin::getFieldsToSerialize() noexcept {
  return guarded<const PluginFieldCollection*>("getFieldsToSerialize", nullptr, [&] {
    serialised_ = settings_;
    if (serialised_.sm_count == 0) {  // this is where the engine is built
      serialised_.sm_count = device().sm_count;
      serialised_.shared_bytes = device().shared_bytes;
    }
    fields_ = fields_of_engine(serialised_);
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &collection_;
  });
}

}  // namespace fastmqa::trt
