// What libmgvq_kernels.so exports: launchers with raw pointers, free of TensorRT and torch. Plain C at the boundary, so that
// ctypes can call it. Every launcher only enqueues on `stream`: no allocation, no synchronization, no host copy, so it may be
// captured in a CUDA graph. Results are the same bits for the same arguments, tactic and device.
//
// All pointers are device memory unless said otherwise. Return cudaErrorInvalidValue for arguments that are refused (then
// mgvq_reason() says why, per thread) and whatever the launch returned else; nothing is launched on a refusal.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#define MGVQ_API extern "C" __attribute__((visibility("default")))

// A K-segment of a weight, or the whole of it.
struct MgvqSegment {
  const void* codes;    // int8[codes_bytes(code, rows, columns)] in device order, 16-byte aligned
  const void* table;    // [2^window, vector], fp16 for vector 2 and int8 for vector 4, 16-byte aligned
  const void* scales;   // fp16[rows], 2-byte aligned
  int64_t columns;      // a multiple of 64 in all segments but the last
  int32_t vector, shift, window, reserved;
};

// W[rows, columns]: segments side by side along the columns.
struct MgvqMatrix {
  const MgvqSegment* segments;  // host memory, segment_count of them
  int64_t rows;
  int32_t segment_count;        // 1..3
  int32_t reserved;
};

// kMgvqFloat32Scaled is for x of mgvq_linear alone: fp32 whose rows are scaled as bf16's are.
enum MgvqType : int32_t {
  kMgvqFloat16 = 0,
  kMgvqFloat32 = 1,
  kMgvqInt32 = 2,
  kMgvqInt64 = 3,
  kMgvqBfloat16 = 4,
  kMgvqFloat32Scaled = 5
};

// Version of this header; a caller refuses a library with another one.
inline constexpr int32_t kMgvqAbi = 3;
MGVQ_API int32_t mgvq_abi();
// Compute capabilities the library carries machine code for, ascending ("80 86 87"): a static string.
MGVQ_API const char* mgvq_architectures();
// Why the last call of this thread was refused; "" when it was not.
MGVQ_API const char* mgvq_reason();

// Bytes of workspace mgvq_linear needs for `tokens` of x_type with a tactic (0: the default) on the current device; -1 on a
// refusal. At most 8 MiB, and a fp16 copy of x for the types that are scaled.
MGVQ_API int64_t mgvq_linear_workspace(const MgvqMatrix* weight, MgvqType x_type, int64_t tokens, int32_t tactic);

// y = x Wᵀ + bias. Products in fp16, sums in fp32, each segment's sum times its row scale in fp32, then the bias, then one
// rounding to y's type. tokens 0 does nothing. What x becomes first, by its type:
//   fp16            nothing
//   fp32            clamped to ±65504 and rounded to fp16; NaN stays NaN
//   bf16, fp32      every row times the power of two that brings its largest magnitude into 2^14..2^15, rounded to fp16;
//   scaled          sums are scaled back in fp32. No row overflows or vanishes; one that is not finite gives NaN
// Arguments:
//   x [tokens, columns], row stride x_stride elements; aligned to its element (rows on 16 bytes load faster, with the same
//   result)
//   y [tokens, rows], row stride y_stride elements; y_type fp16, fp32 or bf16; aligned to its element
//   bias [rows] in bias_type (fp16, fp32 or bf16), or null
//   tactic: mgvq::id_of, 0 for the default
//   workspace: 16-byte aligned, may hold anything
MGVQ_API cudaError_t mgvq_linear(const MgvqMatrix* weight, const void* x, MgvqType x_type, int64_t x_stride, void* y,
                                 MgvqType y_type, int64_t y_stride, const void* bias, MgvqType bias_type, int64_t tokens,
                                 int32_t tactic, void* workspace, int64_t workspace_size, cudaStream_t stream);

// out[rows, columns] fp16 = round(scale · entry), row stride out_stride elements: the oracle, and the way to cuBLAS.
MGVQ_API cudaError_t mgvq_dequantize(const MgvqMatrix* weight, void* out, int64_t out_stride, cudaStream_t stream);

// out[i, :] = W[ids[i], :] in out_type (fp16, fp32 or bf16), rounded once from the exact product; ids int32 or int64. An id outside
// 0..rows-1 gives a row of zeros.
MGVQ_API cudaError_t mgvq_embedding(const MgvqMatrix* weight, const void* ids, MgvqType ids_type, int64_t count, void* out,
                                    MgvqType out_type, cudaStream_t stream);

// Reads `bytes` (a multiple of 16) once and writes one checksum word to sink: the measured roof of `mgvq bench kernels`.
MGVQ_API cudaError_t mgvq_read(const void* data, int64_t bytes, uint32_t* sink, cudaStream_t stream);
