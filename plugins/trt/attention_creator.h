// SPDX-License-Identifier: MIT
//
// Makes AttentionPlugin from the fields of a node or of an engine.
#pragma once

#include <NvInferRuntime.h>

#include <vector>

#include "fields.h"

namespace fastmqa::trt {

class AttentionCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  AttentionCreator();

  nvinfer1::IPluginV3* createPlugin(const char* layer, const PluginFieldCollection* given,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return op::kName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return op::kDomain; }

 private:
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_;
};

}  // namespace fastmqa::trt
