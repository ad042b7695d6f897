#include "tensorrt/creator.h"

#include <cstdio>
#include <string>

#include "tensorrt/log.h"
#include "tensorrt/plugin.h"

namespace mgvq::plugin {

namespace {

Type type_of(nvinfer1::PluginFieldType type) {
  if (type == nvinfer1::PluginFieldType::kINT32) return Type::kInt32;
  return type == nvinfer1::PluginFieldType::kINT64 ? Type::kInt64 : Type::kOther;
}

}  // namespace

Creator::Creator(Op op) : op_(op) {
  for (const char* name : attribute_names(op)) names_.emplace_back(name, nullptr, nvinfer1::PluginFieldType::kINT32, 1);
  collection_ = {static_cast<int32_t>(names_.size()), names_.data()};
}

nvinfer1::IPluginV3* Creator::createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                           nvinfer1::TensorRTPhase) noexcept {
  const char* layer = name ? name : "";
  char who[512];
  std::snprintf(who, sizeof who, "%s %s", name_of(op_), *layer ? layer : "(no name)");
  return guarded<nvinfer1::IPluginV3*>(who, nullptr, [&] {
    std::vector<Field> given;
    for (int i = 0; fields && i < fields->nbFields; ++i) {
      const nvinfer1::PluginField& field = fields->fields[i];
      given.push_back({field.name, type_of(field.type), field.data, field.length});
    }
    std::vector<std::string> ignored;
    const Attributes attributes = attributes_from(op_, given.data(), static_cast<int>(given.size()), &ignored);
    for (const std::string& other : ignored)
      say(Severity::kWARNING, who, words("attribute %s is not one of this plugin's; ignored", other.c_str()).c_str());
    return new VQPlugin(layer, attributes);
  });
}

}  // namespace mgvq::plugin
