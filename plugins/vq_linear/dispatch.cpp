#include "vq_linear/dispatch.h"

namespace mgvq {

namespace {

constexpr int64_t kMostSkinnyTokens = 32;
constexpr int64_t kMostTokens = int64_t{1} << 20;
constexpr int64_t kMostSize = int64_t{1} << 30;  // rows and columns; places are counted in 64 bits, blocks in 32
constexpr int kMostSplit = 16;
constexpr std::size_t kMostWorkspace = std::size_t{8} << 20;
constexpr int64_t kPanelTokens = 4096;  // with 512 rows: 128 blocks of the tiled kernel, most GPUs' share
// 2^31 / (128 · 127), the largest product of int8 numbers, rounded down to a power of two: sums are int32.
constexpr int64_t kMostInt8Columns = int64_t{1} << 17;
// Barriers, the sum of the warps and the write-back of an item, in units of 128 rows by 16 columns a warp.
constexpr double kItemOverhead = 4.0;

std::size_t rounded(std::size_t bytes) { return (bytes + 15) / 16 * 16; }

int64_t row_groups(const Problem& problem) { return padded(problem.rows, kRowGroup) / kRowGroup; }
int64_t blocks_of(const Problem& problem, int segment) {
  return padded(problem.segments[segment].columns, kColumnGroup) / kColumnGroup;
}

bool takes_int8(const Problem& problem) {
  for (int i = 0; i < problem.segment_count; ++i)
    if (problem.segments[i].code.vector != 4 || problem.segments[i].columns > kMostInt8Columns) return false;
  return true;
}

// Time of a skinny launch in units, by how evenly its items fall on the multiprocessors.
double modelled_time(const Problem& problem, const Device& device, int split) {
  const Tactic tactic{Regime::kSkinny, Activations::kFloat16, split};
  const int warps = problem.tokens <= 8 ? 16 : 8;
  double time = 0;
  for (int i = 0; i < problem.segment_count; ++i) {
    const int parts = parts_of(problem, i, tactic);
    const int64_t items = row_groups(problem) * parts, at_once = blocks_at_once(device);
    const int64_t waves = (items + at_once - 1) / at_once;
    const double units = static_cast<double>(blocks_of(problem, i)) / parts / warps;
    time += static_cast<double>(waves) * (units + kItemOverhead);
  }
  return time + (split > 1 ? kItemOverhead : 0);
}

}  // namespace

int blocks_at_once(const Device& device) { return device.multiprocessors; }

int parts_of(const Problem& problem, int segment, const Tactic& tactic) {
  if (tactic.regime != Regime::kSkinny) return 1;
  // A part below eight units a block would leave warps idle.
  const int64_t most = blocks_of(problem, segment) / 8;
  const int64_t parts = tactic.split < most ? tactic.split : most;
  return static_cast<int>(parts < 1 ? 1 : parts);
}

const char* refusal(const Problem& problem, int sm) {
  if (sm != 0 && sm < 80) return "the GPU is older than compute capability 8.0, which the kernels need";
  if (problem.segment_count < 1 || problem.segment_count > kMaxSegments) return "a weight has 1 to 3 segments";
  if (problem.tokens < 0 || problem.tokens > kMostTokens) return "tokens must lie in 0..1048576";
  if (problem.rows < 1 || problem.rows > kMostSize) return "rows must lie in 1..2^30";
  for (int i = 0; i < problem.segment_count; ++i) {
    const auto& segment = problem.segments[i];
    if (!is_known(segment.code)) return "no kernel has this code (vector, shift, window); see layout.h";
    if (segment.columns < 1 || segment.columns > kMostSize) return "columns must lie in 1..2^30";
    if (i + 1 < problem.segment_count && segment.columns % kSegmentColumns != 0)
      return "every segment but the last must have a multiple of 64 columns";
  }
  if (row_groups(problem) > 65535 && problem.tokens > kMostSkinnyTokens)
    return "more than 65535 row groups of 128; split the rows";
  return nullptr;
}

bool is_valid(const Tactic& tactic, const Problem& problem, const Device& device) {
  if (refusal(problem, device.sm)) return false;
  if (tactic.activations == Activations::kInt8 && !takes_int8(problem)) return false;
  if (tactic.regime == Regime::kSkinny)
    return problem.tokens <= kMostSkinnyTokens && tactic.split >= 1 && tactic.split <= kMostSplit &&
           workspace_bytes(problem, device, tactic) <= kMostWorkspace;
  return tactic.regime == Regime::kTiled && tactic.split == 1;
}

Tactic default_tactic(const Problem& problem, const Device& device) {
  if (problem.tokens > kMostSkinnyTokens) return {Regime::kTiled, Activations::kFloat16, 1};
  Tactic best{Regime::kSkinny, Activations::kFloat16, 1};
  // Several segments of very many rows: their sums, one slot a segment, are more than the workspace may hold.
  if (!is_valid(best, problem, device)) return {Regime::kTiled, Activations::kFloat16, 1};
  double least = modelled_time(problem, device, 1);
  for (int split = 2; split <= kMostSplit; ++split) {
    const Tactic tactic{Regime::kSkinny, Activations::kFloat16, split};
    const double time = modelled_time(problem, device, split);
    if (time < 0.98 * least && is_valid(tactic, problem, device)) {
      best = tactic;
      least = time;
    }
  }
  return best;
}

int valid_tactics(const Problem& problem, const Device& device, bool allow_int8, Tactic* out, int capacity) {
  if (refusal(problem, device.sm)) return 0;
  int count = 0;
  const auto add = [&](const Tactic& tactic) {
    if (!is_valid(tactic, problem, device)) return;
    if (count < capacity) out[count] = tactic;
    ++count;
  };
  const Tactic first = default_tactic(problem, device);
  add(first);
  const int kinds = allow_int8 ? 2 : 1;
  for (int kind = 0; kind < kinds; ++kind) {
    const Activations activations = kind ? Activations::kInt8 : Activations::kFloat16;
    const auto other = [&](const Tactic& tactic) {
      if (id_of(tactic) != id_of(first)) add(tactic);
    };
    for (int split = 1; split <= kMostSplit; split *= 2) other({Regime::kSkinny, activations, split});
    if (first.regime == Regime::kSkinny && (first.split & (first.split - 1)) != 0)
      other({Regime::kSkinny, activations, first.split});
    if (problem.tokens > 16 || first.regime == Regime::kTiled) other({Regime::kTiled, activations, 1});
  }
  return count;
}

int id_of(const Tactic& tactic) {
  return static_cast<int>(tactic.regime) << 16 | static_cast<int>(tactic.activations) << 8 | tactic.split;
}

bool tactic_from_id(int id, Tactic* out) {
  const int regime = id >> 16, activations = id >> 8 & 0xff, split = id & 0xff;
  if (id < 0 || regime < 1 || regime > 2 || activations > 1 || split < 1 || split > kMostSplit) return false;
  *out = {static_cast<Regime>(regime), static_cast<Activations>(activations), split};
  return true;
}

std::size_t scale_bytes(const Problem& problem, const Tactic& tactic) {
  if (tactic.activations != Activations::kInt8) return 0;
  const std::size_t scales = rounded(static_cast<std::size_t>(problem.tokens) * sizeof(float));
  if (tactic.regime != Regime::kSkinny) return scales;
  return scales + rounded(static_cast<std::size_t>(problem.tokens * int8_stride(problem)));
}

int64_t int8_stride(const Problem& problem) { return padded(problem.columns(), 2 * kColumnGroup); }

Panel panel_of(const Problem& problem, const Tactic& tactic) {
  if (problem.segment_count == 1) return {problem.rows, problem.tokens};
  const auto sums = static_cast<int64_t>((kMostWorkspace - scale_bytes(problem, tactic)) / sizeof(float));
  const int64_t tokens = problem.tokens < kPanelTokens ? problem.tokens : kPanelTokens;
  const int64_t rows = sums / (tokens > 0 ? tokens : 1) / kRowGroup * kRowGroup;
  return {rows < problem.rows ? rows : problem.rows, tokens};
}

std::size_t workspace_bytes(const Problem& problem, const Device&, const Tactic& tactic) {
  std::size_t bytes = scale_bytes(problem, tactic);
  if (tactic.regime != Regime::kSkinny) {
    if (problem.segment_count == 1) return bytes;
    const std::size_t sums = rounded(static_cast<std::size_t>(problem.tokens * problem.rows) * sizeof(float));
    return bytes + (sums < kMostWorkspace - bytes ? sums : kMostWorkspace - bytes);
  }
  int64_t slots = 0;
  for (int i = 0; i < problem.segment_count; ++i) slots += parts_of(problem, i, tactic);
  if (slots > 1) bytes += rounded(static_cast<std::size_t>(slots * problem.tokens * problem.rows) * sizeof(float));
  return bytes;
}

}  // namespace mgvq
