#include "tensorrt/log.h"

#include <atomic>
#include <cstdio>

namespace mgvq::plugin {

namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

nvinfer1::ILogger* find_logger() noexcept {
  try {
    nvinfer1::ILoggerFinder* const finder = logger_finder.load();
    return finder ? finder->findLogger() : nullptr;
  } catch (...) {
    // findLogger is not noexcept; a message is then better on stderr than lost.
    return nullptr;
  }
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder.store(finder); }

void say(Severity severity, const char* who, const char* what) noexcept {
  char line[1280];
  std::snprintf(line, sizeof line, "mgvq: %s: %s", who, what);
  if (nvinfer1::ILogger* const logger = find_logger())
    logger->log(severity, line);
  else if (severity <= Severity::kWARNING)
    std::fprintf(stderr, "%s\n", line);
}

}  // namespace mgvq::plugin
