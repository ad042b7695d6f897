// Few tokens: every weight is read once, decoded in registers and fed to tensor cores, whose idle columns cost nothing
// (vq-kernels.md 3.1). Time is bytes, or lookups where a multiprocessor is slow.
//
//     item     a row group (128 rows) and a part of its columns; a block takes every gridDim-th and fills its table once
//     warp     every 16th (or 8th) unit of 128 rows by 16 columns of the item; loads run two units ahead
//     sums     fp32 or int32, the warps' added in order through shared memory, then times the row's scale
#pragma once

#include "vq_linear/decode.cuh"
#include "vq_linear/linear.h"

namespace mgvq {

inline constexpr int kRowTiles = kRowGroup / 16;

template <int kTokenTiles>
struct Skinny {
  static constexpr int kThreads = kTokenTiles == 1 ? 512 : 256;
  static constexpr int kWarps = kThreads / kLanes;
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr uint32_t kSumBytes = kWarps * 16 * kTokens * 4;  // one row tile of every warp
};

template <typename T>
MGVQ_DEVICE uint32_t bits_of(T value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
template <typename T>
MGVQ_DEVICE T from_bits(uint32_t bits) {
  T value;
  memcpy(&value, &bits, 4);
  return value;
}

// The units a warp works through, and their activations, loaded ahead.
template <typename Decoding, int kTokenTiles, bool kInt8, bool kPlain>
struct UnitStream {
  static constexpr int kBlocks = kInt8 ? 2 : 1;  // column blocks a step: int8 fragments have 32 columns
  Decoding unit[kBlocks];
  uint32_t x[kTokenTiles][2];

  MGVQ_DEVICE void load(const SegmentLaunch& a, const unsigned char* row_group, int block, int lane) {
    MGVQ_UNROLL for (int i = 0; i < kBlocks; ++i) {
      // Behind an odd last block x is zero, so that any weights do: those of the last block again.
      const int here = block + i < a.column_blocks ? block + i : a.column_blocks - 1;
      unit[i].load(row_group + static_cast<int64_t>(here) * Decoding::kCode.unit_bytes(), lane);
    }
    const int g = lane / 4, q = lane % 4;
    MGVQ_UNROLL for (int n = 0; n < kTokenTiles; ++n)
      MGVQ_UNROLL for (int half = 0; half < 2; ++half) {
        if constexpr (kInt8)
          x[n][half] = 8 * n + g < a.x.tokens
                           ? *reinterpret_cast<const uint32_t*>(a.bytes + (8 * n + g) * a.bytes_stride +
                                                                16 * int64_t{block} + 16 * half + 4 * q)
                           : 0;
        else
          x[n][half] = activation_pair<kPlain>(a.x, 8 * n + g, 16 * int64_t{block} + column_of_lane<Decoding>(q, half));
      }
  }
};

// Adds up the warps' sums, one row tile after another, and writes rows times scale.
template <typename Shape, int kTokenTiles, typename Sum>
MGVQ_DEVICE void finish_item(const SegmentLaunch& a, int group, int part, uint32_t buffer, int warp, int lane,
                             const Sum (&sums)[kRowTiles][kTokenTiles][4]) {
  const int g = lane / 4, q = lane % 4;
  MGVQ_UNROLL for (int tile = 0; tile < kRowTiles; ++tile) {
    MGVQ_UNROLL for (int n = 0; n < kTokenTiles; ++n)
      MGVQ_UNROLL for (int i = 0; i < 4; ++i) {
        const int row = g + 8 * (i / 2), token = 8 * n + 2 * q + i % 2;
        put_shared(buffer + 4 * ((warp * Shape::kTokens + token) * 16 + row), bits_of(sums[tile][n][i]));
      }
    sync_threads();
    for (int place = MGVQ_THREAD; place < 16 * Shape::kTokens; place += Shape::kThreads) {
      Sum sum = 0;
      MGVQ_UNROLL for (int w = 0; w < Shape::kWarps; ++w)
        sum += from_bits<Sum>(shared_word(buffer + 4 * (w * Shape::kTokens * 16 + place)));
      const int token = place / 16;
      const int64_t row = int64_t{group} * kRowGroup + 16 * tile + place % 16;
      if (row < a.rows && token < a.x.tokens) {
        float value = static_cast<float>(sum) * float_of_half(a.scales[row]);
        if (a.token_factors) value *= a.token_factors[token];
        if (a.partial)
          a.partial[((a.first_slot + part) * int64_t{a.x.tokens} + token) * a.rows + row] = value;
        else
          store(a.y, token, row, value + bias_of(a.y, row));
      }
    }
    sync_threads();
  }
}

template <int kVector, int kShift, int kWindow, int kTokenTiles, bool kInt8, bool kPlain>
MGVQ_KERNEL(Skinny<kTokenTiles>::kThreads, 1) skinny_kernel(SegmentLaunch a) {
  using Decoding = Decoder<kVector, kShift, kWindow>;
  using Stream = UnitStream<Decoding, kTokenTiles, kInt8, kPlain>;
  using Shape = Skinny<kTokenTiles>;
  using Sum = std::conditional_t<kInt8, int32_t, float>;
  constexpr uint32_t kTable = 0, kSums = Decoding::kTableBytes;
  const int warp = MGVQ_THREAD / kLanes, lane = MGVQ_THREAD % kLanes;
  const uint32_t lane4 = 4 * lane;
  fill_table<Decoding>(a.table, kTable, !kInt8 && kVector == 4);
  sync_threads();

  const int items = static_cast<int>(padded(a.rows, kRowGroup) / kRowGroup) * a.parts;
  const int steps = (a.column_blocks + Stream::kBlocks - 1) / Stream::kBlocks;
  MGVQ_NO_UNROLL for (int item = MGVQ_BLOCK; item < items; item += MGVQ_BLOCKS) {
    const int group = item / a.parts, part = item % a.parts;
    const Range mine = part_of(steps, part, a.parts);
    const int end = static_cast<int>(mine.end);
    int step = static_cast<int>(mine.begin) + warp;
    const unsigned char* row_group = a.codes + int64_t{group} * a.column_blocks * Decoding::kCode.unit_bytes();
    Sum sums[kRowTiles][kTokenTiles][4] = {};
    Stream next{}, after{};
    if (step < end) next.load(a, row_group, step * Stream::kBlocks, lane);
    if (step + Shape::kWarps < end) after.load(a, row_group, (step + Shape::kWarps) * Stream::kBlocks, lane);
    MGVQ_NO_UNROLL for (; step < end; step += Shape::kWarps) {
      Stream now = next;
      next = after;
      if (step + 2 * Shape::kWarps < end)
        after.load(a, row_group, (step + 2 * Shape::kWarps) * Stream::kBlocks, lane);
      MGVQ_UNROLL for (int i = 0; i < Stream::kBlocks; ++i) now.unit[i].prepare();
      MGVQ_UNROLL for (int tile = 0; tile < kRowTiles; ++tile) {
        uint32_t fragment[4];
        if constexpr (kInt8) {
          MGVQ_UNROLL for (int i = 0; i < 4; ++i)
            fragment[i] = now.unit[i / 2].template entry<kTable>(0, 2 * tile + i % 2, lane4);
        } else {
          half_fragment<Decoding, kTable>(now.unit[0], tile, lane4, fragment);
        }
        MGVQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) mma(sums[tile][n], fragment, now.x[n]);
      }
    }
    finish_item<Shape, kTokenTiles>(a, group, part, kSums, warp, lane, sums);
  }
}

}  // namespace mgvq
