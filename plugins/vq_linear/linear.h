// What the launchers of one code take: filled by kernels.cu, used by linear.cuh. Internal to the library.
#pragma once

#include "vq_linear/activations.cuh"
#include "vq_linear/layout.h"

namespace mgvq {

// One segment of a linear, or of a panel of its rows and tokens. `partial` null: results, with bias, go to y. Else skinny
// writes row-scaled sums to partial[first_slot + part][token][row], fp32, which `reduce` adds up; tiled writes them to
// partial[token][row].
struct SegmentLaunch {
  const unsigned char* codes;
  const void* table;
  const uint16_t* scales;
  Activation x;
  Output y;
  float* partial;
  const float* before;         // tiled: [token][row], what the segments before add up to; or null
  const int8_t* bytes;         // skinny with int8 activations: x in int8 (rows.h); else null
  int64_t bytes_stride;
  const float* token_scales;   // tiled with int8 activations: largest |x| of each token / 127; else null
  const float* token_factors;  // what x's rows were divided by (rows.h), or null
  int64_t rows;
  int column_blocks;          // of 16
  int parts;                  // how many blocks share the columns of a row group (skinny)
  int first_slot;
};

// Launchers of one code. `int8` is for V = 4 alone.
struct CodeLaunchers {
  cudaError_t (*skinny)(const SegmentLaunch&, bool int8, unsigned blocks, cudaStream_t);
  cudaError_t (*tiled)(const SegmentLaunch&, bool int8, cudaStream_t);
};

extern const CodeLaunchers launchers_2_3_8, launchers_2_4_8, launchers_2_5_8, launchers_2_6_6, launchers_2_6_8,
    launchers_2_8_8, launchers_2_8_9, launchers_4_8_8, launchers_4_8_9;

}  // namespace mgvq
