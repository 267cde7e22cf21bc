// SPDX-License-Identifier: MIT
#include "attention_creator.h"

#include "attention_plugin.h"
#include "guard.h"

namespace fastmqa::trt {

AttentionCreator::AttentionCreator()
    : fields_(fields_of_node()),
      collection_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

nvinfer1::IPluginV3* AttentionCreator::createPlugin(const char* layer,
                                                    const PluginFieldCollection* given,
                                                    nvinfer1::TensorRTPhase phase) noexcept {
  if (layer == nullptr) layer = "";
  return guard<nvinfer1::IPluginV3*>(layer, "createPlugin", nullptr, [&] {
    return new AttentionPlugin(layer, parse_fields(given, phase));
  });
}

}  // namespace fastmqa::trt
