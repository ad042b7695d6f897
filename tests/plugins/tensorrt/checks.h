// One line a check and a count.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <string>

inline int checks = 0;
inline int failures = 0;

[[gnu::format(printf, 2, 3)]] inline void check(bool is_so, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  ++checks;
  if (!is_so) ++failures;
  std::printf("%s %s\n", is_so ? "ok    " : "FAILED", text);
}

inline bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }
