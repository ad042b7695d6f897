// Which kernel runs a linear, with how many blocks and how much workspace: plain C++17, so that the TensorRT shell, the
// library and the tests ask the same function. Nothing here touches a device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "vq_linear/layout.h"

namespace mgvq {

// What a plan depends on of a GPU. `sm` is 10·major + minor, as in sm_87.
struct Device {
  int sm;
  int multiprocessors;
  int shared_bytes_per_block;  // with opt-in
};

// y[tokens, rows] = x[tokens, columns] Wᵀ + bias; W is cut along its columns into 1..3 segments of one code each. Every
// segment but the last has a multiple of 64 columns.
struct Problem {
  int64_t tokens;
  int64_t rows;
  int segment_count;
  struct {
    Code code;
    int64_t columns;
  } segments[kMaxSegments];

  constexpr int64_t columns() const {
    int64_t sum = 0;
    for (int i = 0; i < segment_count; ++i) sum += segments[i].columns;
    return sum;
  }
};

enum class Regime : int { kSkinny = 1, kTiled = 2 };           // few tokens: bytes bound; many: tensor cores bound
enum class Activations : int { kFloat16 = 0, kInt8 = 1 };      // int8 is opt-in: it changes the result

// One way to run a problem. `split`: how many blocks share the columns of one row group (kSkinny); 1 for kTiled.
struct Tactic {
  Regime regime;
  Activations activations;
  int split;
};

// Why the problem has no kernel, as text to show; nullptr when it has one. `sm` of 0 leaves the device out.
const char* refusal(const Problem& problem, int sm);

// The tactic used when nobody measured: deterministic, and the same for the same problem and device.
Tactic default_tactic(const Problem& problem, const Device& device);

// Every tactic worth measuring, the default first; writes at most `capacity` of them and returns how many there are.
int valid_tactics(const Problem& problem, const Device& device, bool allow_int8, Tactic* out, int capacity);

// Whether the tactic can run the problem on the device.
bool is_valid(const Tactic& tactic, const Problem& problem, const Device& device);

// A positive number for TensorRT's tactic lists and timing cache, and back; false for a number that is none.
int id_of(const Tactic& tactic);
bool tactic_from_id(int id, Tactic* out);

// Device memory the launch needs beyond its arguments, in bytes; its contents may be anything before and after.
std::size_t workspace_bytes(const Problem& problem, const Device& device, const Tactic& tactic);

// Part of y that one launch of the tiled kernel makes: all of it for a weight of one segment. Segments of more add their
// sums up in fp32, in workspace, and a panel is what that holds.
struct Panel {
  int64_t rows, tokens;
};
Panel panel_of(const Problem& problem, const Tactic& tactic);

// What the launchers ask beside: how many blocks share a segment's columns; how many blocks of the skinny kernel the device
// runs at once; the bytes at the workspace's front that hold the tokens' int8 scales, and with kSkinny x in int8 behind
// them, in rows of `int8_stride` bytes.
int parts_of(const Problem& problem, int segment, const Tactic& tactic);
int blocks_at_once(const Device& device);
std::size_t scale_bytes(const Problem& problem, const Tactic& tactic);
int64_t int8_stride(const Problem& problem);

}  // namespace mgvq
