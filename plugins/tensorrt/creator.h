// Makes the plugins of one op from fields: a node's attributes when a graph is parsed, the serialized ones when an
// engine loads.
#pragma once

#include <vector>

#include "tensorrt/core.h"
#include "tensorrt/tensorrt.h"

namespace mgvq::plugin {

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(Op op);

  // Null after saying why, if attributes_from refuses the fields. The caller owns the plugin.
  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return name_of(op_); }
  const char* getPluginVersion() const noexcept override { return contract::kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return contract::kPluginNamespace; }

 private:
  Op op_;
  std::vector<nvinfer1::PluginField> names_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace mgvq::plugin
