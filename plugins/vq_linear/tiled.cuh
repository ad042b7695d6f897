// Many tokens: 128 rows by 32·n tokens a block. Eight warps, two halves of the rows by four groups of tokens; each decodes
// the weights it multiplies in registers (staging decoded weights would cost a write and a read of shared memory more than
// the lookups do; vq-kernels.md 3.2). Activations come 32 columns at a time through two buffers of shared memory.
#pragma once

#include "vq_linear/skinny.cuh"

namespace mgvq {

template <int kTokenTiles, bool kInt8>
struct Tiled {
  static constexpr int kThreads = 256;
  static constexpr int kRowHalves = 2, kTokenGroups = 4;
  static constexpr int kTokens = kTokenGroups * 8 * kTokenTiles;
  static constexpr int kColumns = 32;                         // a stage
  static constexpr int kDataWords = kInt8 ? 8 : 16;           // of one token
  static constexpr int kStrideWords = kDataWords + 4;         // 8 tokens by 4 words hit 32 banks
  static constexpr uint32_t kStageBytes = 4 * kTokens * kStrideWords;
  static constexpr int kCopies = kTokens * 4 / kThreads;      // pieces of 8 columns a thread
  static constexpr int kPieceWords = kInt8 ? 2 : 4;
  static constexpr int kOutTokens = 8 * kTokenGroups;         // written at a time
  static constexpr int kOutWords = kRowGroup + 4;             // of one: q's 2 tokens lie 8 banks apart, g's rows between
  static constexpr uint32_t kOutBytes = 4 * kOutTokens * kOutWords;
};

// Eight columns of one token, on their way from global to shared memory.
template <typename Shape, bool kInt8>
struct StagePiece {
  uint32_t words[Shape::kPieceWords];

  MGVQ_DEVICE void load(const SegmentLaunch& a, int64_t token, int64_t column) {
    if constexpr (kInt8) {
      const float scale = token < a.x.tokens ? a.token_scales[token] : 0.0f;
      const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
      MGVQ_UNROLL for (int i = 0; i < 2; ++i) words[i] = activation_quad(a.x, token, column + 4 * i, inverse);
    } else {
      MGVQ_UNROLL for (int i = 0; i < 4; ++i) words[i] = activation_pair(a.x, token, column + 2 * i);
    }
  }
  MGVQ_DEVICE void put(uint32_t offset) const {
    MGVQ_UNROLL for (int i = 0; i < Shape::kPieceWords; ++i) put_shared(offset + 4 * i, words[i]);
  }
};

// One stage for one half of the rows: two units of weights against the activations at `stage`.
template <typename Decoding, int kTokenTiles, bool kInt8, int kHalf, typename Sum>
MGVQ_DEVICE void multiply_stage(const unsigned char* units, bool second, uint32_t stage, int first_token, int lane,
                                Sum (&sums)[kRowTiles / 2][kTokenTiles][4]) {
  using Shape = Tiled<kTokenTiles, kInt8>;
  const int g = lane / 4, q = lane % 4;
  const uint32_t lane4 = 4 * lane;
  Decoding unit[2];
  MGVQ_UNROLL for (int i = 0; i < 2; ++i) {
    unit[i].load(units + (second ? i : 0) * Decoding::kCode.unit_bytes(), lane);
    unit[i].prepare();
  }
  constexpr int kRounds = kInt8 ? 1 : 2;  // fragments have 32 columns, or 16
  MGVQ_UNROLL for (int round = 0; round < kRounds; ++round) {
    uint32_t x[kTokenTiles][2];
    MGVQ_UNROLL for (int n = 0; n < kTokenTiles; ++n)
      MGVQ_UNROLL for (int half = 0; half < 2; ++half) {
        const int word = kInt8 ? q + 4 * half : 8 * round + column_of_lane<Decoding>(q, half) / 2;
        x[n][half] = shared_word(stage + 4 * ((first_token + 8 * n + g) * Shape::kStrideWords + word));
      }
    MGVQ_UNROLL for (int tile = 0; tile < kRowTiles / 2; ++tile) {
      const int row_tile = kHalf * (kRowTiles / 2) + tile;
      uint32_t fragment[4];
      if constexpr (kInt8) {
        MGVQ_UNROLL for (int i = 0; i < 4; ++i)
          fragment[i] = unit[i / 2].template entry<0>(0, 2 * row_tile + i % 2, lane4);
      } else {
        half_fragment<Decoding, 0>(unit[round], row_tile, lane4, fragment);
      }
      MGVQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) mma(sums[tile][n], fragment, x[n]);
    }
  }
}

// Four neighbouring rows' sums of a token, times their scales, to where they go.
template <typename Sum>
MGVQ_DEVICE void write_quad(const SegmentLaunch& a, int64_t token, int64_t row, int count, const float (&scales)[4],
                            const float (&bias)[4], const uint32_t (&sums)[4]) {
  float values[4];
  MGVQ_UNROLL for (int i = 0; i < 4; ++i) {
    values[i] = static_cast<float>(from_bits<Sum>(sums[i])) * scales[i];
    if (a.token_scales) values[i] *= a.token_scales[token];
    if (a.token_factors) values[i] *= a.token_factors[token];
    if (a.before && i < count) values[i] += a.before[token * a.rows + row + i];
  }
  if (a.partial) {
    MGVQ_UNROLL for (int i = 0; i < 4; ++i)
      if (i < count) a.partial[token * a.rows + row + i] = values[i];
    return;
  }
  MGVQ_UNROLL for (int i = 0; i < 4; ++i) values[i] += bias[i];
  store_quad(a.y, token, row, count, values);
}

// The block's sums through shared memory, where table and activations stood: 32 tokens at a time, one lane four rows, so
// that a warp writes a token's 128 rows side by side.
template <int kTokenTiles, typename Sum>
MGVQ_DEVICE void write_tiles(const SegmentLaunch& a, int64_t block_row, int64_t block_token, int warp, int lane,
                             const Sum (&sums)[kRowTiles / 2][kTokenTiles][4]) {
  using Shape = Tiled<kTokenTiles, false>;
  const int g = lane / 4, q = lane % 4, half = warp % Shape::kRowHalves, token_group = warp / Shape::kRowHalves;
  const int64_t row = block_row + 4 * lane;
  const int count = row + 4 <= a.rows ? 4 : row < a.rows ? static_cast<int>(a.rows - row) : 0;
  float scales[4] = {}, bias[4] = {};
  MGVQ_UNROLL for (int i = 0; i < 4; ++i)
    if (i < count) {
      scales[i] = float_of_half(a.scales[row + i]);
      bias[i] = bias_of(a.y, row + i);
    }
  MGVQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) {
    sync_threads();  // everybody has read what stood here
    MGVQ_UNROLL for (int tile = 0; tile < kRowTiles / 2; ++tile)
      MGVQ_UNROLL for (int i = 0; i < 4; ++i) {
        const int slot = 8 * token_group + 2 * q + i % 2, in_block = 64 * half + 16 * tile + g + 8 * (i / 2);
        put_shared(4 * (slot * Shape::kOutWords + in_block), bits_of(sums[tile][n][i]));
      }
    sync_threads();
    for (int slot = warp; slot < Shape::kOutTokens; slot += Shape::kThreads / kLanes) {
      const int64_t token = block_token + slot / 8 * 8 * kTokenTiles + 8 * n + slot % 8;
      if (token >= a.x.tokens) continue;
      uint32_t words[4];
      shared_words(4 * (slot * Shape::kOutWords + 4 * lane), words);
      write_quad<Sum>(a, token, row, count, scales, bias, words);
    }
  }
}

template <int kVector, int kShift, int kWindow, int kTokenTiles, bool kInt8>
MGVQ_KERNEL(256, 1) tiled_kernel(SegmentLaunch a) {
  using Decoding = Decoder<kVector, kShift, kWindow>;
  using Shape = Tiled<kTokenTiles, kInt8>;
  using Sum = std::conditional_t<kInt8, int32_t, float>;
  using Piece = StagePiece<Shape, kInt8>;
  constexpr uint32_t kStages = Decoding::kTableBytes;
  const int warp = MGVQ_THREAD / kLanes, lane = MGVQ_THREAD % kLanes;
  const int half = warp % Shape::kRowHalves, first_token = warp / Shape::kRowHalves * 8 * kTokenTiles;
  const int64_t block_token = int64_t{MGVQ_BLOCK} * Shape::kTokens;
  const unsigned char* units = a.codes + int64_t{MGVQ_BLOCK_Y} * a.column_blocks * Decoding::kCode.unit_bytes();
  const int stages = (a.column_blocks + 1) / 2;
  Sum sums[kRowTiles / 2][kTokenTiles][4] = {};
  Piece pieces[Shape::kCopies];

  const auto load = [&](int stage) {
    MGVQ_UNROLL for (int i = 0; i < Shape::kCopies; ++i) {
      const int place = MGVQ_THREAD + i * Shape::kThreads;
      pieces[i].load(a, block_token + place / 4, int64_t{Shape::kColumns} * stage + place % 4 * 8);
    }
  };
  const auto put = [&](int stage) {
    MGVQ_UNROLL for (int i = 0; i < Shape::kCopies; ++i) {
      const int place = MGVQ_THREAD + i * Shape::kThreads;
      pieces[i].put(kStages + stage % 2 * Shape::kStageBytes +
                    4 * (place / 4 * Shape::kStrideWords + place % 4 * Shape::kPieceWords));
    }
  };
  load(0);
  fill_table<Decoding>(a.table, 0, !kInt8 && kVector == 4);
  put(0);
  MGVQ_NO_UNROLL for (int stage = 0; stage < stages; ++stage) {
    // One barrier a stage: it orders this stage's stores before its loads, and the loads of the stage before, which
    // used the other buffer, before the stores at the end of this turn.
    sync_threads();
    if (stage + 1 < stages) load(stage + 1);
    const unsigned char* mine = units + int64_t{2} * stage * Decoding::kCode.unit_bytes();
    const bool second = 2 * stage + 1 < a.column_blocks;
    const uint32_t buffer = kStages + stage % 2 * Shape::kStageBytes;
    if (half)
      multiply_stage<Decoding, kTokenTiles, kInt8, 1>(mine, second, buffer, first_token, lane, sums);
    else
      multiply_stage<Decoding, kTokenTiles, kInt8, 0>(mine, second, buffer, first_token, lane, sums);
    if (stage + 1 < stages) put(stage + 1);
  }
  static_assert(Shape::kOutBytes <= kStages + 2 * Shape::kStageBytes, "sums fit where table and activations stood");
  write_tiles<kTokenTiles>(a, int64_t{MGVQ_BLOCK_Y} * kRowGroup, block_token, warp, lane, sums);
}

}  // namespace mgvq
