// What our C++ test programs share: a failed expectation says what and where, and is counted; main returns the count.
#pragma once

#include <cstdio>

inline int failures = 0;
inline int checks = 0;

#define EXPECT(condition, ...)                                        \
  do {                                                                \
    ++checks;                                                         \
    if (!(condition)) {                                               \
      ++failures;                                                     \
      std::printf("%s:%d: not so: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                       \
      std::printf("\n");                                              \
    }                                                                 \
  } while (0)

inline int report() {
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures ? 1 : 0;
}
