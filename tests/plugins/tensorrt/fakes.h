// The little of TensorRT that a plugin calls back: expressions of sizes, a logger, its finder, a context's resources.
// With them the library is loaded and driven without libnvinfer.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensorrt/tensorrt.h"

// A size of a tensor: a number, or a name that stands for one.
class Size final : public nvinfer1::IDimensionExpr, private nvinfer1::apiv::VDimensionExpr {
 public:
  Size(bool is_known, int64_t value) : is_known_(is_known), value_(value) { mImpl = this; }
  ~Size() noexcept override = default;
  // VDimensionExpr's, which IDimensionExpr forwards to.
  bool isConstant() const override { return is_known_; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }
  const nvinfer1::IDimensionExpr* expression() const { return this; }

 private:
  bool is_known_;
  int64_t value_;
};

class Sizes final : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder {
 public:
  Sizes() { mImpl = this; }
  ~Sizes() noexcept override = default;

  const nvinfer1::IDimensionExpr* of(int64_t value) { return sizes_.emplace_back(value >= 0, value).expression(); }
  // Sizes [rank], -1 for one that is not known.
  nvinfer1::DimsExprs expressions(const std::vector<int64_t>& sizes) {
    nvinfer1::DimsExprs out{};
    out.nbDims = static_cast<int32_t>(sizes.size());
    for (std::size_t i = 0; i < sizes.size(); ++i) out.d[i] = of(sizes[i]);
    return out;
  }
  nvinfer1::IExprBuilder& builder() { return *this; }

  const nvinfer1::IDimensionExpr* constant(int64_t value) override { return of(value); }
  const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation, const nvinfer1::IDimensionExpr&,
                                            const nvinfer1::IDimensionExpr&) override {
    return of(-1);
  }
  const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                    const nvinfer1::IDimensionExpr&) override {
    return nullptr;
  }

 private:
  std::deque<Size> sizes_;  // addresses stay
};

// Keeps what it is told.
class Logger final : public nvinfer1::ILogger {
 public:
  struct Message {
    Severity severity;
    std::string text;
  };
  void log(Severity severity, const char* text) noexcept override { messages.push_back({severity, text}); }
  // All there is, one after another; forgotten then.
  std::string take() {
    std::string text;
    for (const Message& message : messages) text += message.text + "\n";
    messages.clear();
    return text;
  }
  std::vector<Message> messages;
};

class Finder final : public nvinfer1::ILoggerFinder {
 public:
  explicit Finder(Logger* logger) : logger_(logger) {}
  ~Finder() = default;
  nvinfer1::ILogger* findLogger() override {
    if (throws) throw std::runtime_error("no logger today");
    return logger_;
  }
  bool throws = false;

 private:
  Logger* logger_;
};

class Resources final : public nvinfer1::IPluginResourceContext {
 public:
  nvinfer1::IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
  nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
};

// Fields by name, as a parser or an engine would hand them over.
class Fields {
 public:
  Fields& set(const std::string& name, int64_t value,
              nvinfer1::PluginFieldType type = nvinfer1::PluginFieldType::kINT32, int32_t length = 1) {
    entries_[name] = {static_cast<int32_t>(value), value, type, length};
    return *this;
  }
  Fields& drop(const std::string& name) {
    entries_.erase(name);
    return *this;
  }
  const nvinfer1::PluginFieldCollection* collection() {
    list_.clear();
    for (const auto& [name, entry] : entries_) {
      const bool is_wide = entry.type == nvinfer1::PluginFieldType::kINT64;
      const void* data = is_wide ? static_cast<const void*>(&entry.wide) : &entry.narrow;
      list_.emplace_back(name.c_str(), data, entry.type, entry.length);
    }
    collection_ = {static_cast<int32_t>(list_.size()), list_.data()};
    return &collection_;
  }

 private:
  struct Entry {
    int32_t narrow;
    int64_t wide;
    nvinfer1::PluginFieldType type;
    int32_t length;
  };
  std::map<std::string, Entry> entries_;
  std::vector<nvinfer1::PluginField> list_;
  nvinfer1::PluginFieldCollection collection_{};
};

// The library under test and what it logged.
struct Library {
  nvinfer1::IPluginCreatorV3One* linear = nullptr;
  nvinfer1::IPluginCreatorV3One* embedding = nullptr;
  Logger logger;
  Finder finder{&logger};
};

// A plugin and its three sides.
struct Plugin {
  std::unique_ptr<nvinfer1::IPluginV3> whole;
  nvinfer1::IPluginV3OneCore* core = nullptr;
  nvinfer1::IPluginV3OneBuild* build = nullptr;
  nvinfer1::IPluginV3OneRuntime* runtime = nullptr;

  Plugin() = default;
  explicit Plugin(nvinfer1::IPluginV3* plugin) : whole(plugin) {
    using Side = nvinfer1::PluginCapabilityType;
    if (!plugin) return;
    core = static_cast<nvinfer1::IPluginV3OneCore*>(plugin->getCapabilityInterface(Side::kCORE));
    build = static_cast<nvinfer1::IPluginV3OneBuild*>(plugin->getCapabilityInterface(Side::kBUILD));
    runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(plugin->getCapabilityInterface(Side::kRUNTIME));
  }
  explicit operator bool() const { return whole != nullptr; }
};

inline Plugin create(nvinfer1::IPluginCreatorV3One* creator, Fields fields,
                     nvinfer1::TensorRTPhase phase = nvinfer1::TensorRTPhase::kBUILD) {
  return Plugin(creator->createPlugin("layers.0.q_proj", fields.collection(), phase));
}
