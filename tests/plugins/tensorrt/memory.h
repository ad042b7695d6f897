// Where the tensors of a run lie.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

// Memory of the device: the host's own for the emulated kernels.
class Memory {
 public:
  virtual ~Memory() = default;
  // A copy of `bytes` bytes, aligned to 256; freed with this object.
  virtual void* put(const void* from, std::size_t bytes) = 0;
  // Back, after everything enqueued has run; an error of the device ends the program.
  virtual void get(void* to, const void* from, std::size_t bytes) = 0;
  virtual void clear() = 0;
  // Runs `enqueue(stream)` twice: captured once and its graph launched twice where there are graphs. False if it
  // failed.
  virtual bool run_twice(const std::function<bool(void*)>& enqueue) = 0;
  virtual bool has_graphs() const = 0;
};
std::unique_ptr<Memory> host_memory();
// Null where there is no device. Only in programs compiled with nvcc.
std::unique_ptr<Memory> cuda_memory();
