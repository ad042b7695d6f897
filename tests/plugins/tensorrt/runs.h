// One call of a plugin with its tensors in the device's memory.
#pragma once

#include <vector>

#include "plugin_check.h"
#include "problems.h"

// What attachToContext gives for a plugin of these fields, as an engine that was loaded would have it.
inline Plugin attached(nvinfer1::IPluginCreatorV3One* creator, const Fields& fields) {
  const Plugin built = create(creator, fields);
  Plugin loaded(creator->createPlugin("layers.0.q_proj", built.runtime->getFieldsToSerialize(),
                                      nvinfer1::TensorRTPhase::kRUNTIME));
  Resources resources;
  return Plugin(loaded.runtime->attachToContext(&resources));
}

// A call and the bytes of its first input and bias.
struct Run {
  Call call;
  std::vector<uint8_t> first, bias;
  int32_t tactic = 0;
};

inline std::size_t bytes_of(const nvinfer1::PluginTensorDesc& tensor) {
  std::size_t bytes = tensor.type == nvinfer1::DataType::kINT64  ? 8
                      : tensor.type == nvinfer1::DataType::kHALF ? 2
                      : tensor.type == nvinfer1::DataType::kINT8 ? 1
                                                                 : 4;
  for (int i = 0; i < tensor.dims.nbDims; ++i) bytes *= static_cast<std::size_t>(tensor.dims.d[i]);
  return bytes;
}

constexpr uint8_t kCanary = 0xa5;
constexpr std::size_t kMargin = 64;                       // bytes behind the output that must stay
constexpr std::size_t kWorkspace = std::size_t{8} << 20;  // what no plugin may exceed

// The output's bytes with the margin behind them, of a plugin that was told tactic and shapes; empty where it refused.
// `is_repeated`: twice into the same output, out of a CUDA graph where the memory has such.
inline std::vector<uint8_t> enqueue_prepared(const Plugin& plugin, const Weight& weight, const Run& run, Memory& memory,
                                             bool has_workspace = true, std::size_t codes_offset = 0,
                                             bool is_repeated = false) {
  std::vector<uint8_t> codes(codes_offset);
  codes.insert(codes.end(), weight.codes.begin(), weight.codes.end());
  const std::vector<uint8_t> canary(bytes_of(run.call.output()) + kMargin, kCanary), scratch(kWorkspace, 0xff);
  const void* inputs[] = {memory.put(run.first.data(), run.first.size()),
                          static_cast<const uint8_t*>(memory.put(codes.data(), codes.size())) + codes_offset,
                          memory.put(weight.table.data(), weight.table.size()),
                          memory.put(weight.scales.data(), 2 * weight.scales.size()),
                          memory.put(run.bias.data(), run.bias.size())};
  void* const output = memory.put(canary.data(), canary.size());
  void* const workspace = has_workspace ? memory.put(scratch.data(), scratch.size()) : nullptr;
  const auto enqueue_on = [&](void* stream) {
    return plugin.runtime->enqueue(run.call.tensors.data(), &run.call.output(), inputs, &output, workspace,
                                   static_cast<cudaStream_t>(stream)) == 0;
  };
  std::vector<uint8_t> bytes(canary.size());
  if (is_repeated ? memory.run_twice(enqueue_on) : enqueue_on(nullptr))
    memory.get(bytes.data(), output, bytes.size());
  else
    bytes.clear();
  memory.clear();
  return bytes;
}

// The same after setTactic and onShapeChange.
inline std::vector<uint8_t> enqueue(const Plugin& plugin, const Weight& weight, const Run& run, Memory& memory,
                                    bool has_workspace = true, std::size_t codes_offset = 0) {
  if (plugin.runtime->setTactic(run.tactic) != 0 || prepare(plugin, run.call) != 0) return {};
  return enqueue_prepared(plugin, weight, run, memory, has_workspace, codes_offset);
}

inline bool margin_stayed(const std::vector<uint8_t>& bytes) {
  if (bytes.size() < kMargin) return false;
  for (std::size_t i = bytes.size() - kMargin; i < bytes.size(); ++i)
    if (bytes[i] != kCanary) return false;
  return true;
}
