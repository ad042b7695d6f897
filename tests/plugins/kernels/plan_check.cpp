// The plans of every matrix of the published models, on the multiprocessor counts of real GPUs and boards: items cover every
// row group and every unit of the columns once, workspaces and grids stay within their limits, panels tile the result.
#include <cstdint>
#include <set>
#include <tuple>
#include <vector>

#include "check.h"
#include "layer_shapes.h"
#include "vq_linear/dispatch.h"

using namespace mgvq;

namespace {

// Orin Nano 4 and 8 GB, AGX Orin 32 and 64 GB, Thor T4000 and T5000, A100, A10, L4 and RTX 4090, H200, RTX 5090.
constexpr Device kDevices[] = {{87, 4, 163 * 1024},   {87, 8, 163 * 1024},  {87, 14, 163 * 1024}, {87, 16, 163 * 1024},
                               {110, 12, 227 * 1024}, {110, 20, 227 * 1024}, {80, 108, 163 * 1024}, {86, 72, 99 * 1024},
                               {89, 58, 99 * 1024},   {89, 128, 99 * 1024},  {90, 132, 227 * 1024}, {120, 170, 99 * 1024}};
constexpr int64_t kTokens[] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11,  12,  13,
                               14, 15, 16, 17, 31, 32, 33, 64, 65, 127, 512, 2048, 5000};
constexpr std::size_t kMostWorkspace = std::size_t{8} << 20;
constexpr int kMostGridY = 65535;

Problem problem_of(int64_t tokens, const LayerShape& shape, const std::vector<int64_t>& columns, Code code) {
  Problem out{};
  out.tokens = tokens;
  out.rows = shape.rows;
  out.segment_count = static_cast<int>(columns.size());
  for (std::size_t i = 0; i < columns.size(); ++i) {
    out.segments[i].code = code;
    out.segments[i].columns = columns[i];
  }
  return out;
}

// A block takes every blocks-th item: each item once. (What the skinny kernel does; one check a pair is enough.)
void items_are_dealt_once(int64_t items, int64_t blocks) {
  static std::set<std::pair<int64_t, int64_t>> seen;
  if (!seen.insert({items, blocks}).second) return;
  std::vector<int> taken(items);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t item = block; item < items; item += blocks) ++taken[item];
  int64_t wrong = 0;
  for (int count : taken) wrong += count != 1;
  EXPECT(wrong == 0, "%lld of %lld items on %lld blocks", static_cast<long long>(wrong), static_cast<long long>(items),
         static_cast<long long>(blocks));
}

// The parts of the columns, and in each the warps' every warps-th step: each step once, and no part without work.
void steps_are_dealt_once(int64_t steps, int parts, int warps) {
  static std::set<std::tuple<int64_t, int, int>> seen;
  if (!seen.insert({steps, parts, warps}).second) return;
  std::vector<int> taken(steps);
  for (int part = 0; part < parts; ++part) {
    const Range range = part_of(steps, part, parts);
    EXPECT(range.begin < range.end, "part %d of %d has work", part, parts);
    for (int warp = 0; warp < warps; ++warp)
      for (int64_t step = range.begin + warp; step < range.end; step += warps) ++taken[step];
  }
  int64_t wrong = 0;
  for (int count : taken) wrong += count != 1;
  EXPECT(wrong == 0, "%lld of %lld steps in %d parts of %d warps", static_cast<long long>(wrong),
         static_cast<long long>(steps), parts, warps);
}

void skinny_covers(const Problem& given, const Device& device, const Tactic& tactic) {
  const int64_t groups = padded(given.rows, kRowGroup) / kRowGroup;
  for (int i = 0; i < given.segment_count; ++i) {
    const int parts = parts_of(given, i, tactic), warps = given.tokens <= 8 ? 16 : 8;
    const int64_t items = groups * parts, blocks = items < blocks_at_once(device) ? items : blocks_at_once(device);
    EXPECT(items <= INT32_MAX && parts >= 1 && parts <= tactic.split, "%d parts", parts);
    items_are_dealt_once(items, blocks);
    const int64_t column_blocks = padded(given.segments[i].columns, kColumnGroup) / kColumnGroup;
    const bool is_int8 = tactic.activations == Activations::kInt8;
    steps_are_dealt_once(is_int8 ? (column_blocks + 1) / 2 : column_blocks, parts, warps);
  }
}

// Panels side by side are the result, begin at row groups, and their sums fit the workspace.
void panels_cover(const Problem& given, const Device& device, const Tactic& tactic) {
  const Panel panel = panel_of(given, tactic);
  EXPECT(panel.rows >= 1 && panel.tokens >= 1, "%lld x %lld", static_cast<long long>(panel.rows),
         static_cast<long long>(panel.tokens));
  EXPECT(panel.rows == given.rows || panel.rows % kRowGroup == 0, "%lld rows", static_cast<long long>(panel.rows));
  EXPECT(padded(panel.rows, kRowGroup) / kRowGroup <= kMostGridY, "%lld rows", static_cast<long long>(panel.rows));
  const std::size_t sums = given.segment_count > 1 ? 4 * static_cast<std::size_t>(panel.rows * panel.tokens) : 0;
  EXPECT(scale_bytes(given, tactic) + sums <= workspace_bytes(given, device, tactic), "%zu bytes of sums", sums);
}

void plans_hold(const LayerShape& shape, const std::vector<int64_t>& columns, const Device& device) {
  std::size_t before = 0;
  for (int64_t tokens : kTokens) {
    const Problem given = problem_of(tokens, shape, columns, {4, 8, 9});
    EXPECT(!refusal(given, device.sm), "%lldx%lld", static_cast<long long>(shape.rows), static_cast<long long>(shape.columns));
    Tactic tactics[64];
    const int count = valid_tactics(given, device, true, tactics, 64);
    EXPECT(count >= 1 && count <= 64, "%d tactics", count);
    EXPECT(is_valid(default_tactic(given, device), given, device), "the default for %lld tokens of %lld rows",
           static_cast<long long>(tokens), static_cast<long long>(shape.rows));
    for (int i = 0; i < count; ++i) {
      EXPECT(workspace_bytes(given, device, tactics[i]) <= kMostWorkspace, "tactic %d", id_of(tactics[i]));
      if (tactics[i].regime == Regime::kSkinny)
        skinny_covers(given, device, tactics[i]);
      else
        panels_cover(given, device, tactics[i]);
    }
    // A tiled workspace grows with the tokens: one of the largest profile serves every call.
    const std::size_t tiled = workspace_bytes(given, device, {Regime::kTiled, Activations::kInt8, 1});
    EXPECT(tiled >= before, "%zu bytes after %zu", tiled, before);
    before = tiled;
  }
}

}  // namespace

int main() {
  for (const Device& device : kDevices)
    for (const LayerShape& shape : kLayerShapes) {
      plans_hold(shape, {shape.columns}, device);
      if (shape.columns > 4 * kSegmentColumns) {
        const int64_t first = padded(shape.columns / 8, kSegmentColumns);
        plans_hold(shape, {first, 2 * first, shape.columns - 3 * first}, device);
      }
    }
  // One column more than int32 sums of int8 products hold with certainty.
  const LayerShape wide{128, (1 << 17) + 1};
  EXPECT(!is_valid({Regime::kTiled, Activations::kInt8, 1}, problem_of(64, wide, {wide.columns}, {4, 8, 9}), kDevices[0]),
         "int8 sums may overflow");
  EXPECT(is_valid({Regime::kTiled, Activations::kInt8, 1}, problem_of(64, wide, {1 << 17}, {4, 8, 9}), kDevices[0]),
         "they cannot yet");
  return report();
}
