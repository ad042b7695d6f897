// From a lane's packed bytes to mma fragments: 32-fold replicated tables, and the address of every window in one or two
// instructions.
//
//     table in shared memory    entry e, replica l at  e · stride + 4 · l.  Lane l only reads replica l, which is bank l:
//                               no lookup of a warp ever waits for another (vq-kernels.md 2.1).
//
//     strategy `kBytes`         stride 256. After a shift of its word a window is a whole byte, and one byte permute
//     (L = 8, k even)           puts it at bits 8..15 of the address, above 4 · lane.
//     strategy `kFields`        stride 128. A funnel shift brings the window to bits 7..(6 + L), an and-or masks it and
//     (all others)              adds 4 · lane.
#pragma once

#include "vq_linear/device.cuh"
#include "vq_linear/layout.h"

namespace mgvq {

template <int kVector, int kShift, int kWindow>
struct Decoder {
  static constexpr Code kCode{kVector, kShift, kWindow};
  static_assert(is_known(kCode), "a code without a kernel");
  static constexpr bool kBytes = kWindow == 8 && kShift % 2 == 0;
  static constexpr uint32_t kStride = kBytes ? 256 : 128;
  static constexpr uint32_t kTableBytes = kCode.entries() * kStride;
  static constexpr int kChunks = kCode.lane_chunks();
  static constexpr int kLaneWords = kCode.lane_bytes() / 4;
  static constexpr int kStreamBits = kChunkRows * kShift;
  static constexpr int kChunkBits = kStreamBits;
  // Words that hold a chunk's stream and the L − k bits that wrap around behind it.
  static constexpr int kWords = (kStreamBits + kWindow - kShift + 31) / 32;

  uint32_t raw[kLaneWords];
  uint32_t stream[kChunks][kWords];  // most significant bit first, the chunk's start at bit 31 of word 0

  // The bytes of lane `lane` of the unit (128 rows by 16 columns) that begins at `unit`.
  MGVQ_DEVICE void load(const unsigned char* unit, int lane) {
    load_plane<0>(unit, lane);
    if constexpr (kLaneWords > 4) load_plane<1>(unit, lane);
    static_assert(kLaneWords <= 8, "two planes of 16 bytes a lane");
  }

  // Lines the stream up; call once after `load`, before `entry`.
  MGVQ_DEVICE void prepare() {
    uint32_t words[kLaneWords];
    MGVQ_UNROLL for (int i = 0; i < kLaneWords; ++i) words[i] = permute_bytes(raw[i], 0, 0x0123);
    MGVQ_UNROLL for (int chunk = 0; chunk < kChunks; ++chunk)
      MGVQ_UNROLL for (int i = 0; i < kWords; ++i) stream[chunk][i] = word_of(words, chunk, i);
  }

  // The table's entry of window `window` of a chunk: 2 fp16 or 4 int8. `lane4` is 4 · lane; the table begins at
  // `kTable` bytes of shared memory. Arguments but lane4 must be known when the loop around is unrolled.
  template <uint32_t kTable>
  MGVQ_DEVICE uint32_t entry(int chunk, int window, uint32_t lane4) const {
    const int bit = window * kShift;
    if constexpr (kBytes) {
      const int shift = bit % 8, byte = (bit - shift) / 8;
      const uint32_t word = shift ? funnel_right(next_word(chunk, byte / 4), stream[chunk][byte / 4], 32 - shift)
                                  : stream[chunk][byte / 4];
      return shared_word(kTable + permute_bytes(word, lane4, 0x5504u | static_cast<uint32_t>(3 - byte % 4) << 4));
    } else {
      const int word = bit / 32, right = 64 - bit % 32 - kWindow - 7;
      const uint32_t field = right < 32 ? funnel_right(next_word(chunk, word), stream[chunk][word], right)
                                        : stream[chunk][word] >> (right - 32);
      constexpr uint32_t kMask = ((1u << kWindow) - 1) << 7;
      return shared_word(kTable + ((field & kMask) | lane4));
    }
  }

 private:
  template <int kPlane>
  MGVQ_DEVICE void load_plane(const unsigned char* unit, int lane) {
    constexpr int kLeft = kLaneWords - 4 * kPlane, kPlaneWords = kLeft < 4 ? kLeft : 4;
    uint32_t words[kPlaneWords];
    load_stream<kPlaneWords>(unit + kPlane * kLanes * kPlaneBytes + lane * (4 * kPlaneWords), words);
    MGVQ_UNROLL for (int i = 0; i < kPlaneWords; ++i) raw[4 * kPlane + i] = words[i];
  }

  // Bits 32·i … 32·i + 31 of a chunk's stream, which begins again when it ends. 16·k bits: a whole number of half words.
  MGVQ_DEVICE static uint32_t word_of(const uint32_t (&words)[kLaneWords], int chunk, int i) {
    constexpr bool kWhole = kStreamBits % 32 == 0;
    const int begin = chunk * kStreamBits + (kWhole ? 32 * i % kStreamBits : 32 * i);
    if constexpr (kWhole) {
      return words[begin / 32];
    } else {
      const int left = kStreamBits - 32 * i;  // bits before the end
      const uint32_t first = half_word(words, chunk * kStreamBits);
      const uint32_t second = half_word(words, chunk * kStreamBits + 16);
      if (left >= 32) return half_word(words, begin) << 16 | half_word(words, begin + 16);
      if (left == 16) return half_word(words, begin) << 16 | first;
      return first << 16 | second;
    }
  }
  MGVQ_DEVICE static uint32_t half_word(const uint32_t (&words)[kLaneWords], int bit) {
    return bit % 32 ? words[bit / 32] & 0xffff : words[bit / 32] >> 16;
  }
  // The word behind one of the stream; never asked for behind the last, where no window reaches.
  MGVQ_DEVICE uint32_t next_word(int chunk, int i) const { return stream[chunk][i + 1 < kWords ? i + 1 : 0]; }
};

// Copies a table [entries, 4 bytes] into its 32 replicas at `offset` of shared memory. int8 entries are stored as
// value + 128 where `biased`. All threads of the block; a barrier must follow.
template <typename Decoding>
MGVQ_DEVICE void fill_table(const void* table, uint32_t offset, bool biased) {
  const uint32_t* entries = static_cast<const uint32_t*>(table);
  constexpr int kQuads = kLanes / 4;  // 16-byte stores a entry
  for (int i = MGVQ_THREAD; i < Decoding::kCode.entries() * kQuads; i += MGVQ_THREADS) {
    const uint32_t word = entries[i / kQuads] ^ (biased ? 0x80808080u : 0u);
    put_shared4(offset + static_cast<uint32_t>(i / kQuads) * Decoding::kStride + static_cast<uint32_t>(i % kQuads) * 16, word);
  }
}

// Halves u0 u1 and u2 u3 of an entry of value + 128: 0x6400 | u is 1024 + u, exactly; minus 1152 gives the value.
MGVQ_DEVICE void halves_of_quad(uint32_t entry, uint32_t& low, uint32_t& high) {
  low = subtract_halves(permute_bytes(entry, 0x64646464u, 0x4140), 0x64806480u);
  high = subtract_halves(permute_bytes(entry, 0x64646464u, 0x4342), 0x64806480u);
}

// The A fragment of row tile `tile` (rows 16·tile + g and + 8) of a prepared unit. For V = 4 the 16 columns stand in the
// order 4q, 4q+1 | 4q+2, 4q+3, and x is read to match (columns_of_lane).
template <typename Decoding, uint32_t kTable>
MGVQ_DEVICE void half_fragment(const Decoding& unit, int tile, uint32_t lane4, uint32_t (&a)[4]) {
  if constexpr (Decoding::kCode.vector == 2) {
    a[0] = unit.template entry<kTable>(0, 2 * tile, lane4);
    a[1] = unit.template entry<kTable>(0, 2 * tile + 1, lane4);
    a[2] = unit.template entry<kTable>(1, 2 * tile, lane4);
    a[3] = unit.template entry<kTable>(1, 2 * tile + 1, lane4);
  } else {
    halves_of_quad(unit.template entry<kTable>(0, 2 * tile, lane4), a[0], a[2]);
    halves_of_quad(unit.template entry<kTable>(0, 2 * tile + 1, lane4), a[1], a[3]);
  }
}

// First of the two columns (of a block of 16) that word `half` of a lane's B fragment holds; q = lane % 4.
template <typename Decoding>
MGVQ_DEVICE constexpr int column_of_lane(int q, int half) {
  return Decoding::kCode.vector == 2 ? 2 * q + 8 * half : 4 * q + 2 * half;
}

}  // namespace mgvq
