// VQLinear and VQEmbedding as TensorRT sees them: IPluginV3 over core.h's decisions and kernels.h's launchers.
//
//     build   createPlugin, getOutputShapes, supportsFormatCombination, then a profile at a time: configurePlugin,
//             getValidTactics, getWorkspaceSize
//     run     createPlugin (serialized fields), attachToContext, setTactic and onShapeChange in either order, enqueue
//
// What can be refused is refused before enqueue. What enqueue alone can know it still checks: that the tactic suits the
// shapes, alignment of the pointers bound to codes (16 bytes), table (16) and the others (their element), and the status
// of every launch.
//
// enqueue only launches on its stream: no allocation, no synchronization, so it may be captured in a CUDA graph. One
// object serves one execution context at a time, as TensorRT uses it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "tensorrt/core.h"
#include "tensorrt/tensorrt.h"

namespace mgvq::plugin {

class VQPlugin final : public nvinfer1::IPluginV3,
                       public nvinfer1::IPluginV3OneCore,
                       public nvinfer1::IPluginV3OneBuild,
                       public nvinfer1::IPluginV3OneRuntime {
 public:
  // `layer`: the node's name, for messages.
  VQPlugin(const std::string& layer, const Attributes& attributes);
  VQPlugin& operator=(const VQPlugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override;
  const char* getPluginVersion() const noexcept override;
  const char* getPluginNamespace() const noexcept override;

  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count, const nvinfer1::DataType* inputs,
                             int32_t input_count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs* shapes,
                          int32_t shape_count, nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override;
  int32_t getFormatCombinationLimit() noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t output_count) noexcept override;
  std::size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                               const nvinfer1::DynamicPluginTensorDesc* outputs,
                               int32_t output_count) const noexcept override;
  int32_t getNbTactics() noexcept override;
  int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override;
  const char* getTimingCacheID() noexcept override { return timing_id_.c_str(); }
  const char* getMetadataString() noexcept override { return metadata_.c_str(); }

  int32_t setTactic(int32_t tactic) noexcept override;
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                        const nvinfer1::PluginTensorDesc* outputs, int32_t output_count) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descriptions,
                  const nvinfer1::PluginTensorDesc* output_descriptions, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

 private:
  VQPlugin(const VQPlugin& other);

  const char* who() const { return who_.c_str(); }
  Device device() const;
  void check(const Tensor* tensors, int input_count, int output_count) const;
  cudaError_t launch(const nvinfer1::PluginTensorDesc* input_descriptions, nvinfer1::DataType output_type,
                     const void* const* inputs, void* output, void* workspace, cudaStream_t stream) const;

  const std::string layer_, who_;
  const Attributes attributes_;
  const std::string timing_id_, metadata_;
  const std::vector<int32_t> numbers_;
  const std::vector<nvinfer1::PluginField> fields_;  // they point into numbers_
  const nvinfer1::PluginFieldCollection collection_;
  std::vector<int> tactics_;      // of the profile that configurePlugin saw last
  int tactic_ = 0;                // 0: the dispatcher's choice
  int input_count_ = 0;           // enqueue is not told whether there is a bias; 0 until onShapeChange
  std::optional<Device> device_;  // of the context or the profile; read on demand before
};

// The current device. Throws Refused: there is none, or the library has no machine code for it.
Device current_device();

}  // namespace mgvq::plugin
