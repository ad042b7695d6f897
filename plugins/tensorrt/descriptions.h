// TensorRT's descriptions of tensors in core.h's terms.
#pragma once

#include "tensorrt/core.h"
#include "tensorrt/tensorrt.h"
#include "vq_linear/kernels.h"

namespace mgvq::plugin {

inline Type type_of(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kHALF: return Type::kFloat16;
    case nvinfer1::DataType::kFLOAT: return Type::kFloat32;
    case nvinfer1::DataType::kINT8: return Type::kInt8;
    case nvinfer1::DataType::kINT32: return Type::kInt32;
    case nvinfer1::DataType::kINT64: return Type::kInt64;
    default: return Type::kOther;
  }
}

// Throws Refused: the launchers have no such type. type_refusal has refused it before.
inline MgvqType kernel_type_of(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kHALF: return kMgvqFloat16;
    case nvinfer1::DataType::kFLOAT: return kMgvqFloat32;
    case nvinfer1::DataType::kINT32: return kMgvqInt32;
    case nvinfer1::DataType::kINT64: return kMgvqInt64;
    default: throw Refused("a tensor of a type that no launcher takes");
  }
}

// Points into `description`.
inline Tensor tensor_of(const nvinfer1::PluginTensorDesc& description) {
  return {type_of(description.type), description.format == nvinfer1::TensorFormat::kLINEAR, description.dims.nbDims,
          description.dims.d};
}
inline Tensor tensor_of(const nvinfer1::DynamicPluginTensorDesc& description) { return tensor_of(description.desc); }

// Inputs, then the output; `tensors` has room for input_count + 1.
template <typename Description>
void describe(const Description* inputs, int input_count, const Description& output, Tensor* tensors) {
  for (int i = 0; i < input_count; ++i) tensors[i] = tensor_of(inputs[i]);
  tensors[input_count] = tensor_of(output);
}

}  // namespace mgvq::plugin
