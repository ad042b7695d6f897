// What the library exports, and all of it: TensorRT asks for the creators and hands over its loggers.
//
//     registry->loadLibrary("libmgvq_plugin.so")      in C++ and Python
//     trtexec --dynamicPlugins=libmgvq_plugin.so
#include "tensorrt/creator.h"
#include "tensorrt/log.h"

#define MGVQ_EXPORT extern "C" __attribute__((visibility("default")))

MGVQ_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) noexcept {
  using mgvq::plugin::Creator;
  using mgvq::plugin::Op;
  static Creator linear(Op::kLinear), embedding(Op::kEmbedding);
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&linear, &embedding};
  count = 2;
  return creators;
}

MGVQ_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept { mgvq::plugin::set_logger_finder(finder); }
