// Passes over whole rows of activations before a product: scales and copies of int8 ones, fp16 copies of rows that fp16
// could not hold. Internal to the library.
#pragma once

#include "vq_linear/activations.cuh"

namespace mgvq {

// scales[token] = max |x[token, :]| / 127 over x as fp16, fp32[x.tokens]; 0 for a row of zeros, NaN for one that holds
// NaN.
cudaError_t launch_int8_scales(const Activation& x, float* scales, cudaStream_t stream);

// The same, and x in int8: bytes[token, :] = round(x / scale), int8[x.tokens, stride], zeros behind the last column.
// stride is a multiple of 4, at least x.columns; bytes on 4 bytes. The loop over the weights would convert x anew for
// every row group: with it, a step took 397 instructions on sm_87 in (4,8,8), reading this it takes 138.
//   factors fp32[x.tokens], in place: what rows were divided by before (`has_factors`), times scales after
cudaError_t launch_int8_rows(const Activation& x, int8_t* bytes, int64_t stride, float* factors, bool has_factors,
                             cudaStream_t stream);

// halves[token, :] = fp16(x[token, :] · 2^(14 - e)) and factors[token] = 2^(e - 14), with e the exponent of the row's
// largest magnitude, at least -100: the row lies below 65504, and the spacing of fp16's subnormal numbers, 2^-24, is
// 2^-38 of its largest. The factor of a row that is not finite is NaN.
//   x [tokens, columns] bf16 or fp32, row stride x_stride elements
//   halves fp16[tokens, halves_stride], on 16 bytes, halves_stride a multiple of 8; nothing is written behind a row
//   factors fp32[tokens]
cudaError_t launch_scaled_rows(const void* x, MgvqType type, int64_t x_stride, int64_t columns, int64_t tokens,
                               void* halves, int64_t halves_stride, float* factors, cudaStream_t stream);

}  // namespace mgvq
