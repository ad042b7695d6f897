// Picks the instantiation of a code's kernels for a number of tokens. Included by code_V_k_L.cu alone, one code a file, so
// that files compile side by side and a change of one code rebuilds one.
#pragma once

#include <type_traits>

#include "vq_linear/tiled.cuh"

namespace mgvq {

template <int kVector, int kShift, int kWindow, int kTokenTiles, bool kInt8>
cudaError_t launch_skinny_tiles(const SegmentLaunch& segment, unsigned blocks, cudaStream_t stream) {
  using Shape = Skinny<kTokenTiles>;
  const std::size_t shared = Decoder<kVector, kShift, kWindow>::kTableBytes + Shape::kSumBytes;
  // A loop that may meet fp32 or ragged activations issues twice the instructions; most calls need none of that.
  if constexpr (!kInt8)
    if (is_plain(segment.x))
      return launch(skinny_kernel<kVector, kShift, kWindow, kTokenTiles, false, true>, blocks, 1, Shape::kThreads, shared,
                    stream, segment);
  return launch(skinny_kernel<kVector, kShift, kWindow, kTokenTiles, kInt8, false>, blocks, 1, Shape::kThreads, shared,
                stream, segment);
}

template <int kVector, int kShift, int kWindow, bool kInt8>
cudaError_t launch_skinny_of(const SegmentLaunch& segment, unsigned blocks, cudaStream_t stream) {
  if (segment.x.tokens <= 8) return launch_skinny_tiles<kVector, kShift, kWindow, 1, kInt8>(segment, blocks, stream);
  if (segment.x.tokens <= 16) return launch_skinny_tiles<kVector, kShift, kWindow, 2, kInt8>(segment, blocks, stream);
  return launch_skinny_tiles<kVector, kShift, kWindow, 4, kInt8>(segment, blocks, stream);
}

template <int kVector, int kShift, int kWindow, int kTokenTiles, bool kInt8>
cudaError_t launch_tiled_tiles(const SegmentLaunch& segment, cudaStream_t stream) {
  using Shape = Tiled<kTokenTiles, kInt8>;
  const std::size_t shared = Decoder<kVector, kShift, kWindow>::kTableBytes + 2 * Shape::kStageBytes;
  const unsigned row_groups = static_cast<unsigned>(padded(segment.rows, kRowGroup) / kRowGroup);
  return launch(tiled_kernel<kVector, kShift, kWindow, kTokenTiles, kInt8>,
                static_cast<unsigned>((segment.x.tokens + Shape::kTokens - 1) / Shape::kTokens), row_groups,
                Shape::kThreads, shared, stream, segment);
}

template <int kVector, int kShift, int kWindow, bool kInt8>
cudaError_t launch_tiled_of(const SegmentLaunch& segment, cudaStream_t stream) {
  if (segment.x.tokens <= 64) return launch_tiled_tiles<kVector, kShift, kWindow, 2, kInt8>(segment, stream);
  return launch_tiled_tiles<kVector, kShift, kWindow, 4, kInt8>(segment, stream);
}

template <int kVector, int kShift, int kWindow>
cudaError_t launch_skinny(const SegmentLaunch& segment, bool int8, unsigned blocks, cudaStream_t stream) {
  if constexpr (kVector == 4)
    if (int8) return launch_skinny_of<kVector, kShift, kWindow, true>(segment, blocks, stream);
  return int8 ? cudaErrorInvalidValue : launch_skinny_of<kVector, kShift, kWindow, false>(segment, blocks, stream);
}

template <int kVector, int kShift, int kWindow>
cudaError_t launch_tiled(const SegmentLaunch& segment, bool int8, cudaStream_t stream) {
  if constexpr (kVector == 4)
    if (int8) return launch_tiled_of<kVector, kShift, kWindow, true>(segment, stream);
  return int8 ? cudaErrorInvalidValue : launch_tiled_of<kVector, kShift, kWindow, false>(segment, stream);
}

template <int kVector, int kShift, int kWindow>
constexpr CodeLaunchers launchers() {
  return {launch_skinny<kVector, kShift, kWindow>, launch_tiled<kVector, kShift, kWindow>};
}

}  // namespace mgvq
