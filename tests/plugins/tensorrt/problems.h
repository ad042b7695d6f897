// Weights with random codes, calls of both plugins with descriptions of their tensors, and what the reference says to
// them.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "fakes.h"
#include "vq_linear/contract.h"
#include "vq_linear/layout.h"
#include "vq_linear/reference.h"

struct Weight {
  mgvq::Code code;
  int64_t rows, columns;
  std::vector<uint8_t> codes;    // device order
  std::vector<uint8_t> table;    // fp16 or int8, as stored
  std::vector<uint16_t> scales;  // fp16

  MgvqReferenceSegment segment() const {
    return {codes.data(), table.data(), scales.data(), columns, code.vector, code.shift, code.window, 0};
  }
};

inline uint16_t half(float value) { return mgvq_reference_half_from_float(value); }
inline float from_half(uint16_t value) { return mgvq_reference_float_from_half(value); }

// Gaussian entries and uniform scales, or small integers with scales 1 and 2, whose sums are exact in any order.
inline Weight random_weight(const mgvq::Code& code, int64_t rows, int64_t columns, bool is_exact, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> gaussian;
  Weight weight{code, rows, columns, {}, {}, {}};
  weight.codes.resize(static_cast<std::size_t>(mgvq::codes_bytes(code, rows, columns)));
  for (uint8_t& byte : weight.codes) byte = static_cast<uint8_t>(random());
  for (int i = 0; i < code.entries() * code.vector; ++i) {
    const int small = static_cast<int>(random() % 9) - 4, wide = static_cast<int>(random() % 255) - 127;
    if (code.vector == 4) {
      weight.table.push_back(static_cast<uint8_t>(is_exact ? small : wide));
    } else {
      const uint16_t value = half(is_exact ? static_cast<float>(small) : gaussian(random));
      weight.table.push_back(static_cast<uint8_t>(value));
      weight.table.push_back(static_cast<uint8_t>(value >> 8));
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    weight.scales.push_back(
        half(is_exact ? 1.0f + static_cast<float>(random() % 2) : 0.01f + static_cast<float>(random() % 100) / 1000));
  return weight;
}

inline Fields fields_of(const Weight& weight, bool allow_int8 = false) {
  using namespace mgvq::contract;
  Fields fields;
  fields.set(kAttributeRows, weight.rows).set(kAttributeColumns, weight.columns);
  fields.set(kAttributeVector, weight.code.vector).set(kAttributeShift, weight.code.shift);
  fields.set(kAttributeWindow, weight.code.window).set(kAttributeFormatVersion, kFormatVersion);
  if (allow_int8) fields.set("allow_int8", 1);
  return fields;
}

inline nvinfer1::Dims dims(const std::vector<int64_t>& sizes) {
  nvinfer1::Dims out{};
  out.nbDims = static_cast<int32_t>(sizes.size());
  for (std::size_t i = 0; i < sizes.size(); ++i) out.d[i] = sizes[i];
  return out;
}

inline nvinfer1::PluginTensorDesc description(const std::vector<int64_t>& sizes, nvinfer1::DataType type) {
  return {dims(sizes), type, nvinfer1::TensorFormat::kLINEAR, -1.0f};
}

// Descriptions of one call: inputs, then the output. x, or ids, has the sizes `leading`, and columns behind them for x.
struct Call {
  std::vector<nvinfer1::PluginTensorDesc> tensors;
  int32_t inputs = 0;

  const nvinfer1::PluginTensorDesc& output() const { return tensors.back(); }
};

inline Call call_of(const Weight& weight, const std::vector<int64_t>& leading, nvinfer1::DataType first,
                    nvinfer1::DataType output, const nvinfer1::DataType* bias = nullptr) {
  using nvinfer1::DataType;
  const bool is_linear = first == DataType::kFLOAT || first == DataType::kHALF;
  std::vector<int64_t> x = leading, y = leading;
  if (is_linear) x.push_back(weight.columns);
  y.push_back(is_linear ? weight.rows : weight.columns);
  Call call;
  call.tensors = {description(x, first), description({static_cast<int64_t>(weight.codes.size())}, DataType::kINT8),
                  description({weight.code.entries(), weight.code.vector},
                              weight.code.vector == 4 ? DataType::kINT8 : DataType::kHALF),
                  description({weight.rows}, DataType::kHALF)};
  if (bias) call.tensors.push_back(description({weight.rows}, *bias));
  call.inputs = static_cast<int32_t>(call.tensors.size());
  call.tensors.push_back(description(y, output));
  return call;
}

// The same with a profile: the first of `leading` runs from least to most.
inline std::vector<nvinfer1::DynamicPluginTensorDesc> profile_of(const Call& call, int64_t least, int64_t likely,
                                                                 int64_t most) {
  std::vector<nvinfer1::DynamicPluginTensorDesc> out;
  for (std::size_t i = 0; i < call.tensors.size(); ++i) {
    nvinfer1::DynamicPluginTensorDesc tensor{call.tensors[i], call.tensors[i].dims, call.tensors[i].dims,
                                             call.tensors[i].dims};
    if (i == 0 || i + 1 == call.tensors.size()) {
      tensor.desc.dims.d[0] = -1;
      tensor.min.d[0] = least, tensor.opt.d[0] = likely, tensor.max.d[0] = most;
    }
    out.push_back(tensor);
  }
  return out;
}

inline int32_t configure(const Plugin& plugin, const std::vector<nvinfer1::DynamicPluginTensorDesc>& tensors) {
  const auto inputs = static_cast<int32_t>(tensors.size()) - 1;
  return plugin.build->configurePlugin(tensors.data(), inputs, &tensors.back(), 1);
}
inline int32_t prepare(const Plugin& plugin, const Call& call) {
  return plugin.runtime->onShapeChange(call.tensors.data(), call.inputs, &call.output(), 1);
}
