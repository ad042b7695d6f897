// Messages to the logger of whoever called the plugin, and the boundary no exception crosses.
#pragma once

#include <exception>
#include <string>
#include <utility>

#include "tensorrt/core.h"
#include "tensorrt/tensorrt.h"

namespace mgvq::plugin {

using Severity = nvinfer1::ILogger::Severity;

// Where TensorRT looks its loggers up; null is none.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// "mgvq: who: what" to TensorRT's logger. Without one, errors and warnings go to stderr, so that no reason is lost.
void say(Severity severity, const char* who, const char* what) noexcept;

// What `body` returns, or `failure` after saying what it threw.
template <typename Result, typename Body>
Result guarded(const char* who, Result failure, Body&& body) noexcept {
  try {
    return std::forward<Body>(body)();
  } catch (const Refused& refused) {
    say(Severity::kERROR, who, refused.what());
  } catch (const std::exception& error) {
    say(Severity::kINTERNAL_ERROR, who, error.what());
  } catch (...) {
    say(Severity::kINTERNAL_ERROR, who, "an exception of an unknown type");
  }
  return failure;
}

}  // namespace mgvq::plugin
