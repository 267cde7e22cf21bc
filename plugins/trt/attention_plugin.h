// SPDX-License-Identifier: MIT
//
// One FusedAttention node in TensorRT: descriptions of tensors in, a call of attention.h out.
#pragma once

#include <NvInferRuntime.h>
#include <fastmqa/attention.h>

#include <string>
#include <vector>

#include "fields.h"

namespace fastmqa::trt {

using nvinfer1::PluginTensorDesc;

class AttentionPlugin final : public nvinfer1::IPluginV3,
                              public nvinfer1::IPluginV3OneCore,
                              public nvinfer1::IPluginV3OneBuild,
                              public nvinfer1::IPluginV3OneRuntime {
 public:
  // `layer` is for messages. Settings that name no GPU are of a node, others of an engine.
  AttentionPlugin(std::string layer, const Settings& settings);

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // IPluginV3OneCore
  const char* getPluginName() const noexcept override { return op::kName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return op::kDomain; }

  // IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count,
                             const nvinfer1::DataType* inputs,
                             int32_t input_count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                          const nvinfer1::DimsExprs* shape_inputs, int32_t shape_input_count,
                          nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t output_count) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t output_count) const noexcept override;
  int32_t getNbTactics() noexcept override { return static_cast<int32_t>(tactics_.size()); }
  int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override;
  const char* getTimingCacheID() noexcept override { return timing_id_.c_str(); }
  const char* getMetadataString() noexcept override { return description_.c_str(); }

  // IPluginV3OneRuntime
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  int32_t setTactic(int32_t tactic) noexcept override;
  int32_t onShapeChange(const PluginTensorDesc* inputs, int32_t input_count,
                        const PluginTensorDesc* outputs, int32_t output_count) noexcept override;
  int32_t enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc* output_descs,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  const PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
  // guard() with this layer's name.
  template <class Result, class Body>
  Result guarded(const char* function, Result failed, Body&& body) const noexcept;

  void check_counts(int32_t input_count, int32_t output_count) const;

  // The GPU that is current when this is first called, as much of it as the engine may use.
  const Device& device() const;

  std::string layer_;
  Settings settings_;
  std::string description_;
  std::string timing_id_;
  mutable Device device_{};  // SM 0: not asked for yet

  std::vector<int32_t> tactics_;  // TensorRT's numbers, from 1 on
  int32_t tactic_ = 0;            // attention.h's
  AttentionParams call_{};        // of the last shapes, without addresses

  // What getFieldsToSerialize() returned, which must stay.
  Settings serialised_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

}  // namespace fastmqa::trt
