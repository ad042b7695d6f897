// TensorRT's public headers, quietly, and the versions of them that the shell is written for.
#pragma once

#include <cuda_runtime_api.h>

#if defined(MGVQ_EMULATE)
// TensorRT's headers name events; the emulator of CUDA has none.
typedef struct CUevent_st* cudaEvent_t;
#endif

// Included as ordinary headers they warn about their own deprecated and unused names.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <NvInferRuntime.h>
#pragma GCC diagnostic pop

// 10.3 is JetPack 6's. Everything the shell uses is in it and in all versions up to 11.1, so nothing newer needs a
// guard: IPluginV3 with tactics and a timing-cache id, and the creator that getCreators hands out.
static_assert(NV_TENSORRT_MAJOR > 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR >= 3),
              "the plugins need TensorRT 10.3 or newer (JetPack 6.1)");
