#include "tensorrt/plugin.h"

#include <memory>
#include <new>

#include "tensorrt/descriptions.h"
#include "tensorrt/log.h"
#include "vq_linear/kernels.h"

namespace mgvq::plugin {

namespace {

constexpr int kMostTensors = contract::kLinearInputs + 1;

std::vector<nvinfer1::PluginField> fields_of(Op op, const std::vector<int32_t>& numbers) {
  const std::vector<const char*> names = attribute_names(op);
  std::vector<nvinfer1::PluginField> fields;
  for (std::size_t i = 0; i < names.size(); ++i)
    fields.emplace_back(names[i], &numbers[i], nvinfer1::PluginFieldType::kINT32, 1);
  return fields;
}

}  // namespace

// A kernel whose interface changed must not reuse times of the old one, hence the ABI in the id.
VQPlugin::VQPlugin(const std::string& layer, const Attributes& attributes)
    : layer_(layer),
      who_(words("%s %s", name_of(attributes.op), layer.empty() ? "(no name)" : layer.c_str())),
      attributes_(attributes),
      timing_id_(words("mgvq abi=%d ", kMgvqAbi) + description_of(attributes)),
      metadata_(description_of(attributes)),
      numbers_(numbers_of(attributes)),
      fields_(fields_of(attributes.op, numbers_)),
      collection_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

VQPlugin::VQPlugin(const VQPlugin& other) : VQPlugin(other.layer_, other.attributes_) {
  tactics_ = other.tactics_;
  tactic_ = other.tactic_;
  input_count_ = other.input_count_;
  device_ = other.device_;
}

nvinfer1::IPluginCapability* VQPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* VQPlugin::clone() noexcept {
  return guarded<nvinfer1::IPluginV3*>(who(), nullptr, [&] { return new VQPlugin(*this); });
}

const char* VQPlugin::getPluginName() const noexcept { return name_of(attributes_.op); }
const char* VQPlugin::getPluginVersion() const noexcept { return contract::kPluginVersion; }
const char* VQPlugin::getPluginNamespace() const noexcept { return contract::kPluginNamespace; }

Device VQPlugin::device() const { return device_ ? *device_ : current_device(); }

// Throws Refused unless inputs and output are what the attributes demand.
void VQPlugin::check(const Tensor* tensors, int input_count, int output_count) const {
  const auto refuse = [](const std::string& why) {
    if (!why.empty()) throw Refused(why);
  };
  refuse(count_refusal(attributes_, input_count, output_count));
  for (int i = 0; i <= input_count; ++i) {
    refuse(type_refusal(attributes_, i, tensors, input_count));
    refuse(shape_refusal(attributes_, i, tensors, input_count));
  }
}

int32_t VQPlugin::setTactic(int32_t tactic) noexcept {
  return guarded(who(), -1, [&] {
    check_tactic(attributes_, tactic);
    tactic_ = tactic;
    return 0;
  });
}

int32_t VQPlugin::onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                                const nvinfer1::PluginTensorDesc* outputs, int32_t output_count) noexcept {
  return guarded(who(), -1, [&] {
    Tensor tensors[kMostTensors];
    if (input_count < kMostTensors && output_count == 1) describe(inputs, input_count, outputs[0], tensors);
    check(tensors, input_count, output_count);
    const int64_t tokens = tokens_of(attributes_, tensors[0]);
    // Not the tactic: on the way to another profile TensorRT may name that profile's tactic after its shapes.
    check_range(attributes_, {tokens, tokens, tokens}, device());
    input_count_ = input_count;
    return 0;
  });
}

nvinfer1::IPluginV3* VQPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  return guarded<nvinfer1::IPluginV3*>(who(), nullptr, [&] {
    auto attached = std::unique_ptr<VQPlugin>(new VQPlugin(*this));
    attached->device_ = current_device();
    return attached.release();
  });
}

int32_t VQPlugin::enqueue(const nvinfer1::PluginTensorDesc* input_descriptions,
                          const nvinfer1::PluginTensorDesc* output_descriptions, const void* const* inputs,
                          void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return guarded(who(), -1, [&] {
    if (input_count_ == 0) throw Refused("enqueue before an onShapeChange that was accepted");
    const cudaError_t status =
        launch(input_descriptions, output_descriptions[0].type, inputs, outputs[0], workspace, stream);
    if (status != cudaSuccess)
      throw Refused(
          words("a launch failed: %s%s%s", cudaGetErrorString(status), *mgvq_reason() ? ": " : "", mgvq_reason()));
    return 0;
  });
}

cudaError_t VQPlugin::launch(const nvinfer1::PluginTensorDesc* input_descriptions, nvinfer1::DataType output_type,
                             const void* const* inputs, void* output, void* workspace, cudaStream_t stream) const {
  const Code& code = attributes_.code;
  const MgvqSegment segment{inputs[contract::kLinearInputCodes],
                            inputs[contract::kLinearInputTable],
                            inputs[contract::kLinearInputScales],
                            attributes_.columns,
                            code.vector,
                            code.shift,
                            code.window,
                            0};
  const MgvqMatrix weight{&segment, attributes_.rows, 1, 0};
  const int64_t tokens = tokens_of(attributes_, tensor_of(input_descriptions[0]));
  const MgvqType type_in = kernel_type_of(input_descriptions[0].type), type_out = kernel_type_of(output_type);
  if (attributes_.op == Op::kEmbedding)
    return mgvq_embedding(&weight, inputs[contract::kEmbeddingInputIds], type_in, tokens, output, type_out, stream);
  const bool has_bias = input_count_ == contract::kLinearInputs;
  const int at = contract::kLinearInputBias;
  const std::size_t workspace_bytes = workspace_for(attributes_, tactic_, tokens, device());
  return mgvq_linear(&weight, inputs[contract::kLinearInputX], type_in, attributes_.columns, output, type_out,
                     attributes_.rows, has_bias ? inputs[at] : nullptr,
                     has_bias ? kernel_type_of(input_descriptions[at].type) : kMgvqFloat16, tokens, tactic_, workspace,
                     static_cast<int64_t>(workspace_bytes), stream);
}

Device current_device() {
  const auto check = [](cudaError_t status, const char* what) {
    if (status != cudaSuccess)
      throw Refused(words("%s: %s; the plugin plans and runs on a CUDA device", what, cudaGetErrorString(status)));
  };
  Device out{};
  int number = 0, major = 0, minor = 0;
  check(cudaGetDevice(&number), "no current CUDA device");
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    check(cudaDeviceGetAttribute(value, attribute, number), "an attribute of the CUDA device cannot be read");
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&out.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&out.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  out.sm = 10 * major + minor;
  const std::string why = architecture_refusal(mgvq_architectures(), out.sm);
  if (!why.empty()) throw Refused(why);
  return out;
}

}  // namespace mgvq::plugin
