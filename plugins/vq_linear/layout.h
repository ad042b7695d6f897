// The weight format in C++17, with neither CUDA nor TensorRT: what a code is, how a matrix is padded, and where in device
// order the bytes of a chunk stand. toolchain/vq/format.py defines the format; a test compares both for every code.
//
//     chunk         16 rows (128·R + g + 8·t, t = 0…15) by V adjacent columns; 16 symbols of k bits, 2·k bytes,
//                   most significant bit first; window t is the L bits from bit k·t, wrapping inside the chunk
//     device order  [R, block of 16 columns, plane, lane][byte]; lane = 4·g + q owns chunks q (and q + 4 when V = 2) of
//                   its block; its bytes are cut in planes of 16 (the last may be shorter)
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define MGVQ_BOTH __host__ __device__
#else
#define MGVQ_BOTH
#endif

namespace mgvq {

inline constexpr int kRowGroup = 128;
inline constexpr int kColumnGroup = 16;
inline constexpr int kChunkRows = 16;
inline constexpr int kRowStride = 8;
inline constexpr int kLanes = 32;
inline constexpr int kPlaneBytes = 16;
inline constexpr int kMaxSegments = 3;
// K-segments begin at multiples of this, so that no block of columns of any kernel spans two of them.
inline constexpr int kSegmentColumns = 64;

// V weights a lookup, k stream bits a lookup, L window bits. A table has 2^L entries of 4 bytes: 2 fp16 or 4 int8.
struct Code {
  int vector, shift, window;

  MGVQ_BOTH constexpr bool operator==(const Code& other) const {
    return vector == other.vector && shift == other.shift && window == other.window;
  }
  MGVQ_BOTH constexpr int entries() const { return 1 << window; }
  MGVQ_BOTH constexpr int table_bytes() const { return 4 << window; }
  MGVQ_BOTH constexpr int chunk_bytes() const { return kChunkRows * shift / 8; }
  // Chunks of one lane in a block of 16 columns: 2 for V = 2, 1 for V = 4.
  MGVQ_BOTH constexpr int lane_chunks() const { return kColumnGroup / vector / 4; }
  MGVQ_BOTH constexpr int lane_bytes() const { return lane_chunks() * chunk_bytes(); }
  // Bytes of 128 rows by 16 columns: what a warp reads at once.
  MGVQ_BOTH constexpr int unit_bytes() const { return kLanes * lane_bytes(); }
};

// The codes that have kernels, in the order of toolchain/values.py CODE_NAMES.
inline constexpr Code kCodes[] = {{4, 8, 8}, {2, 6, 6}, {2, 8, 8}, {2, 3, 8}, {2, 4, 8},
                                  {2, 5, 8}, {2, 6, 8}, {2, 8, 9}, {4, 8, 9}};
inline constexpr int kCodeCount = static_cast<int>(sizeof(kCodes) / sizeof(kCodes[0]));

constexpr bool is_known(const Code& code) {
  for (const Code& known : kCodes)
    if (known == code) return true;
  return false;
}

// Numbers from `begin` to below `end`.
struct Range {
  int64_t begin, end;
};

// Part `part` of 0…`steps` - 1 cut into `parts`: together they are all of them, each once, and their sizes differ by one.
MGVQ_BOTH constexpr Range part_of(int64_t steps, int part, int parts) {
  return {steps * part / parts, steps * (part + 1) / parts};
}

MGVQ_BOTH constexpr int64_t padded(int64_t size, int64_t group) { return (size + group - 1) / group * group; }

// Bytes of the packed codes of a matrix, padding included.
MGVQ_BOTH constexpr int64_t codes_bytes(const Code& code, int64_t rows, int64_t columns) {
  return padded(rows, kRowGroup) / kRowGroup * (padded(columns, kColumnGroup) / kColumnGroup) * code.unit_bytes();
}

// Offset of one byte of a lane's stream inside its unit of 128 rows by 16 columns.
MGVQ_BOTH constexpr int byte_in_unit(const Code& code, int lane, int byte) {
  const int plane = byte / kPlaneBytes;
  const int left = code.lane_bytes() - plane * kPlaneBytes;
  const int width = left < kPlaneBytes ? left : kPlaneBytes;
  return plane * kLanes * kPlaneBytes + lane * width + byte % kPlaneBytes;
}

// Where one weight's window begins: unit (row group, column block), lane, chunk of that lane, window of that chunk, and
// which of the entry's V values it is.
struct Place {
  int64_t unit;
  int lane, chunk, window, value;
};

MGVQ_BOTH constexpr Place place_of(const Code& code, int64_t row, int64_t column, int64_t columns) {
  const int64_t blocks = padded(columns, kColumnGroup) / kColumnGroup;
  const int in_group = static_cast<int>(row % kRowGroup), in_block = static_cast<int>(column % kColumnGroup);
  const int chunk_in_block = in_block / code.vector;
  return {row / kRowGroup * blocks + column / kColumnGroup, 4 * (in_group % kRowStride) + chunk_in_block % 4,
          chunk_in_block / 4, in_group / kRowStride, in_block % code.vector};
}

}  // namespace mgvq
