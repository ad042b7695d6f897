#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "memory.h"

namespace {

constexpr std::size_t kAtLeast = 1;  // cudaMalloc of nothing gives no pointer

void must(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("FAILED %s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

class CudaMemory final : public Memory {
 public:
  ~CudaMemory() override { clear(); }
  void* put(const void* from, std::size_t bytes) override {
    void* block = nullptr;
    must(cudaMalloc(&block, bytes + kAtLeast), "cudaMalloc");
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
  // Strict capture: an allocation or synchronization inside enqueue would end it with an error.
  bool run_twice(const std::function<bool(void*)>& enqueue) override {
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
    must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "the begin of a capture");
    const bool is_enqueued = enqueue(stream);
    must(cudaStreamEndCapture(stream, &graph), "the end of a capture");
    must(cudaGraphInstantiate(&executable, graph, 0), "a graph of what was captured");
    for (int i = 0; i < 2; ++i) must(cudaGraphLaunch(executable, stream), "a launch of the graph");
    must(cudaStreamSynchronize(stream), "the graph");
    must(cudaGraphExecDestroy(executable), "the end of the graph");
    must(cudaGraphDestroy(graph), "the end of the graph");
    must(cudaStreamDestroy(stream), "the end of the stream");
    return is_enqueued;
  }
  bool has_graphs() const override { return true; }

 private:
  std::vector<void*> blocks_;
};

}  // namespace

std::unique_ptr<Memory> cuda_memory() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return nullptr;
  return std::make_unique<CudaMemory>();
}
