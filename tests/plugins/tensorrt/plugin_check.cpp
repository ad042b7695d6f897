// Loads a plugin library as TensorRT would, without libnvinfer, and drives it through fakes of what it calls back.
//
//     plugin_check LIBRARY host    kernels on host memory (the emulated library): everything, enqueue included
//     plugin_check LIBRARY none    no device: creation, shapes, formats; planning must be refused in words
//     plugin_check LIBRARY cuda    kernels on the GPU (only where this program was compiled with nvcc); 77 without one
//
// One line a check and a count; the exit status is 1 if one failed.
#include "plugin_check.h"

#include <dlfcn.h>

#include <cstring>

#include "checks.h"

namespace {

constexpr int kSkipped = 77;

using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&);
using SetLoggerFinder = void (*)(nvinfer1::ILoggerFinder*);

bool load(const char* path, Library* library) {
  void* const handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    check(false, "the library loads: %s", dlerror());
    return false;
  }
  const auto creators = reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"));
  const auto finder = reinterpret_cast<SetLoggerFinder>(dlsym(handle, "setLoggerFinder"));
  check(creators && finder, "the library has getCreators and setLoggerFinder");
  if (!creators || !finder) return false;
  finder(&library->finder);
  int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* const list = creators(count);
  check(count == 2, "two creators");
  for (int32_t i = 0; i < count; ++i) {
    check(std::strcmp(list[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0, "creator %d is a V3 creator", i);
    auto* const creator = static_cast<nvinfer1::IPluginCreatorV3One*>(list[i]);
    const std::string name = creator->getPluginName();
    if (name == "VQLinear") library->linear = creator;
    if (name == "VQEmbedding") library->embedding = creator;
    check(std::strcmp(creator->getPluginVersion(), "1") == 0, "%s has version 1", name.c_str());
    check(std::strcmp(creator->getPluginNamespace(), "") == 0, "%s is in the empty namespace", name.c_str());
  }
  check(library->linear && library->embedding, "VQLinear and VQEmbedding are there");
  return library->linear && library->embedding;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string where = argc == 3 ? argv[2] : "";
  if (where != "host" && where != "none" && where != "cuda") {
    std::printf("usage: %s LIBRARY host|none|cuda\n", argv[0]);
    return 2;
  }
  std::unique_ptr<Memory> memory;
  if (where == "host") memory = host_memory();
#if !defined(MGVQ_EMULATE)
  if (where == "cuda") memory = cuda_memory();
#endif
  if (where == "cuda" && !memory) {
    std::printf("skipped: no CUDA device\n");
    return kSkipped;
  }
  std::printf("TensorRT headers %d.%d.%d\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH);
  Library library;
  if (load(argv[1], &library)) {
    check_creation(library);
    check_shapes_and_formats(library);
    if (memory) {
      check_planning(library);
      check_runs(library, *memory);
      check_run_refusals(library, *memory);
    } else {
      check_planning_without_device(library);
    }
  }
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures ? 1 : 0;
}
