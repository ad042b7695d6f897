#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "placed_memory.h"

namespace {

void must(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

class DeviceMemory final : public PlacedMemory {
 public:
  ~DeviceMemory() override { clear(); }
  void* put(const void* from, std::size_t bytes, std::size_t) override {
    void* block = nullptr;
    must(cudaMalloc(&block, bytes ? bytes : 1), "cudaMalloc");
    blocks_.push_back(block);
    must(cudaMemcpy(block, from, bytes, cudaMemcpyHostToDevice), "a copy to the device");
    return block;
  }
  void get(void* to, const void* from, std::size_t bytes) override {
    must(cudaDeviceSynchronize(), "the kernels");
    must(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "a copy from the device");
  }
  void clear() override {
    must(cudaDeviceSynchronize(), "the kernels");
    for (void* block : blocks_) must(cudaFree(block), "cudaFree");
    blocks_.clear();
  }

 private:
  std::vector<void*> blocks_;
};

}  // namespace

std::unique_ptr<PlacedMemory> device_memory() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return nullptr;
  return std::make_unique<DeviceMemory>();
}
