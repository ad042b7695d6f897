// The weight format, slowly and obviously, on host memory: plain C++17 that any compiler builds, with neither CUDA nor
// TensorRT. What every kernel is compared with; itself compared with toolchain/vq/format.py bit for bit by a test.
//
// libmgvq_reference.so exports it as plain C, for ctypes. A function that returns int gives 0, or 1 when it refused its
// arguments: then mgvq_reference_reason() says why, and nothing was written.
#pragma once

#include <cstdint>

#include "vq_linear/layout.h"

#define MGVQ_REFERENCE_API extern "C" __attribute__((visibility("default")))

// The memory layout of MgvqSegment in kernels.h, all pointers host memory without any alignment demand.
struct MgvqReferenceSegment {
  const uint8_t* codes;    // [codes_bytes(code, rows, columns)] in device order
  const void* table;       // [2^window, vector], fp16 for vector 2 and int8 for vector 4
  const uint16_t* scales;  // fp16[rows]
  int64_t columns;         // a multiple of 64 in all segments but the last
  int32_t vector, shift, window, reserved;
};

// The memory layout of MgvqMatrix: W[rows, columns], 1..3 segments side by side along the columns.
struct MgvqReferenceMatrix {
  const MgvqReferenceSegment* segments;
  int64_t rows;
  int32_t segment_count;
  int32_t reserved;
};

MGVQ_REFERENCE_API const char* mgvq_reference_reason();

// float32 of fp16 bits: exact, for every value there is.
MGVQ_REFERENCE_API float mgvq_reference_float_from_half(uint16_t half);
// fp16 bits of the nearest fp16, ties to even, beyond 65504 + 16 to infinity: what cvt.rn.f16.f32 gives. NaN is 0x7fff.
MGVQ_REFERENCE_API uint16_t mgvq_reference_half_from_float(float value);
// x [count] as the kernels see it: clamped to ±65504, then rounded to fp16. NaN stays NaN.
MGVQ_REFERENCE_API void mgvq_reference_round_activations(const float* x, int64_t count, float* rounded);

// Ŵ float32[rows, columns] = float32(scale[row]) · float32(entry); the product is exact.
MGVQ_REFERENCE_API int mgvq_reference_decode(const MgvqReferenceMatrix* weight, float* out);

// y = x Ŵᵀ + bias in double: x float32[tokens, columns] as given, bias float32[rows] or null, y double[tokens, rows].
// magnitude double[tokens, rows], or null: Σ |w·x| (without the bias), which bounds any order of summation's error.
MGVQ_REFERENCE_API int mgvq_reference_linear(const MgvqReferenceMatrix* weight, const float* x, const float* bias,
                                             int64_t tokens, double* y, double* magnitude);

// The same in float32 in the kernels' arithmetic with one order of summation: for each segment Σ x·entry column after
// column, times the row's scale, the segments one after another, then the bias. y float32[tokens, rows].
MGVQ_REFERENCE_API int mgvq_reference_linear_float(const MgvqReferenceMatrix* weight, const float* x, const float* bias,
                                                   int64_t tokens, float* y);

// out[i, :] = Ŵ[ids[i], :] float32[count, columns]; zeros where ids[i] is outside 0..rows-1.
MGVQ_REFERENCE_API int mgvq_reference_embedding(const MgvqReferenceMatrix* weight, const int64_t* ids, int64_t count,
                                                float* out);
