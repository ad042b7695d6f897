#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "tensorrt/core.h"

namespace mgvq::plugin {

namespace {

bool is_board(int sm) { return sm == 87 || sm == 101 || sm == 110; }

// Every count that may take the most workspace: splits of columns are for few tokens, and what a token adds grows with
// them.
std::vector<int64_t> counts_up_to(int64_t most) {
  constexpr int64_t kEach = 256;
  std::vector<int64_t> counts;
  for (int64_t count = 1; count <= std::min(most, kEach); ++count) counts.push_back(count);
  for (int64_t count = 2 * kEach; count < most; count *= 2) counts.push_back(count);
  if (most > kEach) counts.push_back(most);
  return counts;
}

}  // namespace

Problem problem_of(const Attributes& attributes, int64_t tokens) {
  Problem problem{};
  problem.tokens = tokens;
  problem.rows = attributes.rows;
  problem.segment_count = 1;
  problem.segments[0].code = attributes.code;
  problem.segments[0].columns = attributes.columns;
  return problem;
}

void check_range(const Attributes& attributes, const TokenRange& range, const Device& device) {
  if (range.least > range.likely || range.likely > range.most)
    throw Refused(words("expected a profile with min <= opt <= max tokens, found %lld, %lld, %lld",
                        static_cast<long long>(range.least), static_cast<long long>(range.likely),
                        static_cast<long long>(range.most)));
  // An embedding gathers one row a block, whatever their number: only weight and device matter.
  const int64_t most = attributes.op == Op::kLinear ? range.most : 1;
  if (const char* why = refusal(problem_of(attributes, most), device.sm))
    throw Refused(words("%lld tokens on sm_%d: %s", static_cast<long long>(range.most), device.sm, why));
}

std::vector<int> tactics_of(const Attributes& attributes, const TokenRange& range, const Device& device) {
  if (attributes.op == Op::kEmbedding) return {};
  const Problem least = problem_of(attributes, range.least), most = problem_of(attributes, range.most);
  if (default_tactic(least, device).regime != default_tactic(most, device).regime) return {};
  const Problem likely = problem_of(attributes, range.likely);
  std::vector<Tactic> found(64);
  const int count = valid_tactics(likely, device, attributes.allow_int8, found.data(), static_cast<int>(found.size()));
  found.resize(std::min<std::size_t>(count, found.size()));
  std::vector<int> ids;
  for (const Tactic& tactic : found)
    if (is_valid(tactic, least, device) && is_valid(tactic, most, device)) ids.push_back(id_of(tactic));
  return ids;
}

void check_tactic(const Attributes& attributes, int id) {
  Tactic tactic{};
  if (id == 0) return;
  if (attributes.op == Op::kEmbedding || !tactic_from_id(id, &tactic))
    throw Refused(
        words("tactic %d: expected 0%s", id, attributes.op == Op::kLinear ? " or one of getValidTactics" : ""));
  if (tactic.activations == Activations::kInt8 && !attributes.allow_int8)
    throw Refused(words("tactic %d: rounds activations to int8, which this node does not allow (%s = 0)", id,
                        contract::kAttributeAllowInt8));
}

Tactic tactic_for(const Attributes& attributes, int id, int64_t tokens, const Device& device) {
  const Problem problem = problem_of(attributes, tokens);
  if (const char* why = refusal(problem, device.sm))
    throw Refused(words("%lld tokens on sm_%d: %s", static_cast<long long>(tokens), device.sm, why));
  if (id == 0) return default_tactic(problem, device);
  Tactic tactic{};
  check_tactic(attributes, id);
  if (!tactic_from_id(id, &tactic) || !is_valid(tactic, problem, device))
    throw Refused(words("tactic %d cannot run %lld tokens on sm_%d; the engine was built for another profile or device",
                        id, static_cast<long long>(tokens), device.sm));
  return tactic;
}

std::size_t workspace_for(const Attributes& attributes, int id, int64_t tokens, const Device& device) {
  if (attributes.op == Op::kEmbedding) return 0;
  return workspace_bytes(problem_of(attributes, tokens), device, tactic_for(attributes, id, tokens, device));
}

std::size_t workspace_of(const Attributes& attributes, const TokenRange& range, const Device& device,
                         std::size_t limit) {
  if (attributes.op == Op::kEmbedding) return 0;
  std::vector<int> ids = tactics_of(attributes, range, device);
  ids.push_back(0);
  std::size_t most = 0;
  for (const int64_t tokens : counts_up_to(range.most))
    for (const int id : ids) {
      Tactic tactic{};
      // Below the profile a tactic need not be valid; then no call uses it there.
      const bool is_used =
          id == 0 || (tactic_from_id(id, &tactic) && is_valid(tactic, problem_of(attributes, tokens), device));
      if (is_used) most = std::max(most, workspace_for(attributes, id, tokens, device));
    }
  if (most > limit)
    throw Refused(words("%lld tokens need %zu bytes of workspace, the limit is %zu; build with a smaller profile",
                        static_cast<long long>(range.most), most, limit));
  return most;
}

std::string architecture_refusal(const std::string& architectures, int sm) {
  std::istringstream list(architectures);
  std::string name;
  bool is_told = false;
  while (list >> name) {
    is_told = true;
    const int number = std::atoi(name.c_str());  // "90a" is 90
    const bool is_same = number == sm, runs = number / 10 == sm / 10 && number <= sm && !is_board(number);
    if (is_same || (runs && !is_board(sm))) return "";
  }
  if (!is_told) return "";
  return words("expected machine code for sm_%d, found %s; build the plugin with -DCMAKE_CUDA_ARCHITECTURES=%d-real",
               sm, architectures.c_str(), sm);
}

}  // namespace mgvq::plugin
