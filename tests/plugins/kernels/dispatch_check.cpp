// What dispatch.h promises: the default is valid and first, ids go both ways, refusals come in words, workspaces are small.
#include <set>
#include <string>

#include "check.h"
#include "vq_linear/dispatch.h"

using namespace mgvq;

namespace {

constexpr Device kDevices[] = {{87, 8, 163 * 1024}, {86, 82, 99 * 1024}, {90, 132, 227 * 1024}, {110, 20, 227 * 1024}};

Problem problem(int64_t tokens, int64_t rows, int64_t columns, Code code = {2, 4, 8}) {
  Problem out{};
  out.tokens = tokens;
  out.rows = rows;
  out.segment_count = 1;
  out.segments[0].code = code;
  out.segments[0].columns = columns;
  return out;
}

void tactics_are_valid_and_distinct(const Problem& given, const Device& device, bool int8) {
  Tactic tactics[64];
  const int count = valid_tactics(given, device, int8, tactics, 64);
  EXPECT(count >= 1 && count <= 64, "%d tactics", count);
  EXPECT(id_of(tactics[0]) == id_of(default_tactic(given, device)), "the default comes first");
  std::set<int> ids;
  for (int i = 0; i < count; ++i) {
    ids.insert(id_of(tactics[i]));
    Tactic back{};
    EXPECT(id_of(tactics[i]) > 0 && tactic_from_id(id_of(tactics[i]), &back), "id %d", id_of(tactics[i]));
    EXPECT(id_of(back) == id_of(tactics[i]), "id %d comes back", id_of(tactics[i]));
    EXPECT(is_valid(tactics[i], given, device), "tactic %d", id_of(tactics[i]));
    EXPECT(workspace_bytes(given, device, tactics[i]) <= (std::size_t{8} << 20), "workspace of %d", id_of(tactics[i]));
    EXPECT(int8 || tactics[i].activations == Activations::kFloat16, "int8 was not asked for");
  }
  EXPECT(static_cast<int>(ids.size()) == count, "%d ids for %d tactics", static_cast<int>(ids.size()), count);
}

void refusals_have_words() {
  const auto says = [](const Problem& given, int sm, const char* part) {
    const char* reason = refusal(given, sm);
    EXPECT(reason && std::string(reason).find(part) != std::string::npos, "%s in %s", part, reason ? reason : "nothing");
  };
  says(problem(1, 128, 64, {2, 7, 8}), 0, "code");
  says(problem(1, 0, 64), 0, "rows");
  says(problem(1, 128, 0), 0, "columns");
  says(problem(-1, 128, 64), 0, "tokens");
  says(problem(1, 128, 64), 75, "8.0");
  Problem uneven = problem(1, 128, 48);
  uneven.segment_count = 2;
  uneven.segments[1] = uneven.segments[0];
  says(uneven, 87, "multiple of 64");
  EXPECT(!refusal(problem(2048, 18944, 3584), 87), "a layer of a 7B model");
}

}  // namespace

int main() {
  for (const Device& device : kDevices)
    for (int64_t tokens : {1, 8, 9, 17, 32, 33, 2048})
      for (auto [rows, columns] : {std::pair<int64_t, int64_t>{128, 64}, {4608, 3584}, {37888, 3584}, {3584, 18944}, {152064, 3584}})
        for (const Code& code : kCodes) tactics_are_valid_and_distinct(problem(tokens, rows, columns, code), device, code.vector == 4);
  refusals_have_words();
  Tactic none{};
  for (int id : {0, -1, 3 << 16 | 1, 1 << 16, 1 << 16 | 2 << 8 | 1, 1 << 16 | 200})
    EXPECT(!tactic_from_id(id, &none), "id %d is none", id);
  EXPECT(!is_valid({Regime::kSkinny, Activations::kInt8, 1}, problem(1, 128, 64), kDevices[0]), "int8 needs int8 tables");
  EXPECT(!is_valid({Regime::kSkinny, Activations::kFloat16, 1}, problem(33, 128, 64), kDevices[0]), "33 tokens are many");
  return report();
}
