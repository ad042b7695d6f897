// VQPlugin while an engine is built: shapes, types, tactics, workspace.
#include <algorithm>

#include "tensorrt/descriptions.h"
#include "tensorrt/log.h"
#include "tensorrt/plugin.h"

namespace mgvq::plugin {

namespace {

constexpr int kMostTensors = contract::kLinearInputs + 1;

// Sizes of an input that are constants, -1 for the others.
Tensor known_sizes(const nvinfer1::DimsExprs& expressions, int64_t (&sizes)[kMostDimensions]) {
  const int rank = std::min(expressions.nbDims, kMostDimensions);
  for (int i = 0; i < rank; ++i) sizes[i] = expressions.d[i]->isConstant() ? expressions.d[i]->getConstantValue() : -1;
  return {Type::kOther, true, rank, sizes};
}

TokenRange range_of(const Attributes& attributes, const nvinfer1::DynamicPluginTensorDesc& activation) {
  const auto tokens = [&](const nvinfer1::Dims& sizes) {
    return tokens_of(attributes, {Type::kOther, true, sizes.nbDims, sizes.d});
  };
  return {tokens(activation.min), tokens(activation.opt), tokens(activation.max)};
}

}  // namespace

int32_t VQPlugin::getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count,
                                     const nvinfer1::DataType* inputs, int32_t input_count) const noexcept {
  return guarded(who(), -1, [&] {
    const std::string why = count_refusal(attributes_, input_count, output_count);
    if (!why.empty()) throw Refused(why);
    // Rows of an embedding begin the residual stream, which is float32.
    outputs[0] = attributes_.op == Op::kLinear ? inputs[0] : nvinfer1::DataType::kFLOAT;
    return 0;
  });
}

int32_t VQPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*,
                                  int32_t shape_count, nvinfer1::DimsExprs* outputs, int32_t output_count,
                                  nvinfer1::IExprBuilder& builder) noexcept {
  return guarded(who(), -1, [&] {
    std::string why = count_refusal(attributes_, input_count, output_count);
    if (why.empty() && shape_count != 0) why = words("expected no shape inputs, found %d", shape_count);
    Tensor tensors[kMostTensors];
    int64_t sizes[kMostTensors][kMostDimensions];
    for (int i = 0; why.empty() && i < input_count; ++i) {
      tensors[i] = known_sizes(inputs[i], sizes[i]);
      why = shape_refusal(attributes_, i, tensors, input_count);
    }
    if (!why.empty()) throw Refused(why);
    const int leading = inputs[0].nbDims - (attributes_.op == Op::kLinear ? 1 : 0);
    outputs[0].nbDims = leading + 1;
    std::copy_n(inputs[0].d, leading, outputs[0].d);
    outputs[0].d[leading] = builder.constant(output_width(attributes_));
    if (outputs[0].d[leading] == nullptr) throw Refused("TensorRT gave no expression for the output's last size");
    return 0;
  });
}

bool VQPlugin::supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                         int32_t input_count, int32_t output_count) noexcept {
  return guarded(who(), false, [&] {
    std::string why = count_refusal(attributes_, input_count, output_count);
    if (why.empty() && (position < 0 || position > input_count))
      why = words("expected a position in 0..%d, found %d", input_count, position);
    if (!why.empty()) throw Refused(why);
    Tensor described[kMostTensors];
    for (int i = 0; i <= position; ++i) described[i] = tensor_of(tensors[i].desc);
    why = shape_refusal(attributes_, position, described, input_count);
    if (!why.empty()) throw Refused(why);
    // TensorRT probes types and formats: false is an answer here, and no cause for a warning. A build that fails for it
    // shows what was said of types (toolchain/device/builder.py).
    why = type_refusal(attributes_, position, described, input_count);
    if (why.empty()) return true;
    say(described[position].is_linear ? Severity::kINFO : Severity::kVERBOSE, who(), why.c_str());
    return false;
  });
}

int32_t VQPlugin::getFormatCombinationLimit() noexcept {
  return type_combinations(attributes_,
                           attributes_.op == Op::kLinear ? contract::kLinearInputs : contract::kEmbeddingInputs);
}

int32_t VQPlugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                                  const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t output_count) noexcept {
  return guarded(who(), -1, [&] {
    Tensor tensors[kMostTensors];
    if (input_count < kMostTensors && output_count == 1) describe(inputs, input_count, outputs[0], tensors);
    check(tensors, input_count, output_count);
    const Device here = current_device();
    const TokenRange range = range_of(attributes_, inputs[0]);
    check_range(attributes_, range, here);
    workspace_of(attributes_, range, here);
    tactics_ = tactics_of(attributes_, range, here);
    device_ = here;
    return 0;
  });
}

// configurePlugin has refused what this would refuse; the launcher refuses a call whose workspace is missing.
std::size_t VQPlugin::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t,
                                       const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept {
  return guarded(who(), std::size_t{0},
                 [&] { return workspace_of(attributes_, range_of(attributes_, inputs[0]), device()); });
}

int32_t VQPlugin::getNbTactics() noexcept { return static_cast<int32_t>(tactics_.size()); }

int32_t VQPlugin::getValidTactics(int32_t* tactics, int32_t count) noexcept {
  return guarded(who(), -1, [&] {
    if (count != static_cast<int32_t>(tactics_.size()))
      throw Refused(words("expected room for %zu tactics, found %d", tactics_.size(), count));
    std::copy(tactics_.begin(), tactics_.end(), tactics);
    return 0;
  });
}

}  // namespace mgvq::plugin
