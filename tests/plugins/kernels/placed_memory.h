// Where the arrays of a check lie: each on its own, so that what is read or written beside one is noticed.
#pragma once

#include <cstddef>
#include <memory>

class PlacedMemory {
 public:
  virtual ~PlacedMemory() = default;
  // A copy of `bytes` bytes, freed by `clear`. `alignment` is what the launchers ask; no byte more is promised.
  virtual void* put(const void* from, std::size_t bytes, std::size_t alignment) = 0;
  // Back, after everything that was launched has run; an error of the device ends the program.
  virtual void get(void* to, const void* from, std::size_t bytes) = 0;
  virtual void clear() = 0;
};

// Host memory between pages that cannot be touched: a byte behind an array (`is_at_end`), or before it, ends the program
// with a segmentation fault.
std::unique_ptr<PlacedMemory> guarded_memory(bool is_at_end);
// The GPU's; compute-sanitizer watches its bounds. Null where there is no GPU. Only in programs compiled with nvcc.
std::unique_ptr<PlacedMemory> device_memory();
