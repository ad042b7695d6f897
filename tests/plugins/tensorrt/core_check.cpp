// What the plugins decide, without TensorRT: attributes, types, shapes, tactics and workspace, and that every refusal
// names what is wrong.
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "tensorrt/core.h"

using namespace mgvq;
using namespace mgvq::plugin;

namespace {

constexpr Device kOrin{87, 8, 163 * 1024};

template <typename Body>
std::string refusal_of(Body&& body) {
  try {
    body();
  } catch (const Refused& refused) {
    return refused.what();
  }
  return "";
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

Attributes attributes_of(Op op, int32_t rows, int32_t columns, const Code& code, bool allow_int8 = false) {
  return {op, rows, columns, code, contract::kFormatVersion, allow_int8};
}

// Fields of the numbers, in the order given; `changed` replaces the number of one name, int64 as wide numbers.
Attributes read_back(const Attributes& attributes, bool is_wide, const std::string& changed = "", int64_t value = 0) {
  const std::vector<const char*> names = attribute_names(attributes.op);
  const std::vector<int32_t> numbers = numbers_of(attributes);
  std::vector<int64_t> wide(numbers.begin(), numbers.end());
  std::vector<Field> fields;
  for (std::size_t i = names.size(); i-- > 0;) {
    const bool is_changed = names[i] == changed;
    if (is_changed) wide[i] = value;
    if (is_wide || is_changed)
      fields.push_back({names[i], Type::kInt64, &wide[i], 1});
    else
      fields.push_back({names[i], Type::kInt32, &numbers[i], 1});
  }
  return attributes_from(attributes.op, fields.data(), static_cast<int>(fields.size()), nullptr);
}

void check_attributes() {
  std::set<std::string> descriptions;
  for (const Op op : {Op::kLinear, Op::kEmbedding})
    for (const Code& code : kCodes)
      for (const bool is_wide : {false, true}) {
        const Attributes given = attributes_of(op, 300, 77, code, op == Op::kLinear);
        const Attributes read = read_back(given, is_wide);
        EXPECT(numbers_of(read) == numbers_of(given), "%s", description_of(read).c_str());
        descriptions.insert(std::string(name_of(op)) + description_of(read));
      }
  EXPECT(descriptions.size() == 2 * kCodeCount, "%zu descriptions", descriptions.size());

  const Attributes given = attributes_of(Op::kLinear, 300, 77, {2, 4, 8});
  const std::map<std::string, std::vector<int64_t>> refused{{"rows", {0, -1, int64_t{1} << 31, int64_t{1} << 40}},
                                                            {"columns", {0, -7, int64_t{1} << 31}},
                                                            {"vector", {0, 3, 65}},
                                                            {"shift", {0, 7, -1}},
                                                            {"window", {0, 7, 1000}},
                                                            {"format_version", {0, -1, 2}},
                                                            {"allow_int8", {-1, 2}}};
  for (const auto& [name, values] : refused)
    for (const int64_t value : values) {
      const std::string why = refusal_of([&] { read_back(given, false, name, value); });
      EXPECT(has(why, name) && has(why, std::to_string(value)), "%s = %lld: %s", name.c_str(),
             static_cast<long long>(value), why.c_str());
    }
  const std::string newer = refusal_of([&] { read_back(given, false, "format_version", 2); });
  EXPECT(has(newer, "newer"), "%s", newer.c_str());
}

void check_fields() {
  const int32_t numbers[] = {300, 77, 2, 4, 8, 1};
  const std::vector<const char*> names = attribute_names(Op::kEmbedding);
  const auto read = [&](std::vector<Field> fields, std::vector<std::string>* ignored = nullptr) {
    return refusal_of(
        [&] { attributes_from(Op::kEmbedding, fields.data(), static_cast<int>(fields.size()), ignored); });
  };
  std::vector<Field> good;
  for (int i = 0; i < 6; ++i) good.push_back({names[i], Type::kInt32, &numbers[i], 1});
  EXPECT(read(good).empty(), "%s", read(good).c_str());
  for (int i = 0; i < 6; ++i) {
    std::vector<Field> fields = good;
    fields.erase(fields.begin() + i);
    EXPECT(has(read(fields), names[i]) && has(read(fields), "missing"), "%s", read(fields).c_str());
    fields = good;
    fields[i].type = Type::kFloat32;
    EXPECT(has(read(fields), names[i]) && has(read(fields), "type"), "%s", read(fields).c_str());
    fields = good;
    fields[i].length = 2;
    EXPECT(has(read(fields), names[i]) && has(read(fields), "found 2"), "%s", read(fields).c_str());
    fields = good;
    fields[i].data = nullptr;
    EXPECT(has(read(fields), names[i]) && has(read(fields), "found 0"), "%s", read(fields).c_str());
    fields = good;
    fields.push_back(good[i]);
    EXPECT(has(read(fields), names[i]) && has(read(fields), "twice"), "%s", read(fields).c_str());
  }
  std::vector<Field> fields = good;
  fields.push_back({"allow_int8", Type::kInt32, &numbers[5], 1});  // VQLinear's alone
  std::vector<std::string> ignored;
  EXPECT(read(fields, &ignored).empty() && ignored == std::vector<std::string>{"allow_int8"}, "%zu", ignored.size());
  fields[0].name = nullptr;
  EXPECT(has(read(fields), "without a name"), "%s", read(fields).c_str());
}

// Tensors of a right call with the sizes of x, or ids, in front.
struct Call {
  std::vector<std::vector<int64_t>> sizes;
  std::vector<Tensor> tensors;
  int inputs;

  Call(const Attributes& attributes, std::vector<int64_t> activation, bool has_bias) {
    const bool is_linear = attributes.op == Op::kLinear;
    std::vector<int64_t> y = activation;
    if (is_linear) y.pop_back();
    y.push_back(output_width(attributes));
    const Code& code = attributes.code;
    sizes = {activation,
             {codes_bytes(code, attributes.rows, attributes.columns)},
             {code.entries(), code.vector},
             {attributes.rows}};
    std::vector<Type> types{is_linear ? Type::kFloat16 : Type::kInt64, Type::kInt8,
                            code.vector == 4 ? Type::kInt8 : Type::kFloat16, Type::kFloat16};
    if (has_bias) sizes.push_back({attributes.rows}), types.push_back(Type::kFloat32);
    inputs = static_cast<int>(sizes.size());
    sizes.push_back(y), types.push_back(is_linear ? Type::kFloat16 : Type::kFloat32);
    for (int i = 0; i <= inputs; ++i)
      tensors.push_back({types[i], true, static_cast<int>(sizes[i].size()), sizes[i].data()});
  }
  std::string refused(const Attributes& attributes, int position) const {
    const std::string type = type_refusal(attributes, position, tensors.data(), inputs);
    return type.empty() ? shape_refusal(attributes, position, tensors.data(), inputs) : type;
  }
};

void check_tensors() {
  for (const Op op : {Op::kLinear, Op::kEmbedding})
    for (const Code& code : kCodes)
      for (const std::vector<int64_t>& leading : {std::vector<int64_t>{}, {5}, {2, 3}, {1, 1, 4}, {-1, 6}})
        for (const bool has_bias : {false, true}) {
          const Attributes attributes = attributes_of(op, 300, 77, code);
          if (op == Op::kEmbedding && has_bias) continue;
          std::vector<int64_t> activation = leading;
          if (op == Op::kLinear) activation.push_back(77);
          Call call(attributes, activation, has_bias);
          for (int i = 0; i <= call.inputs; ++i) {
            EXPECT(call.refused(attributes, i).empty(), "%s", call.refused(attributes, i).c_str());
            // Another last size, one dimension more, another format, a type nobody takes: each refused on its own.
            Call wrong = call;
            wrong.sizes[i].empty() ? wrong.sizes[i].push_back(1) : void(++wrong.sizes[i].back());
            wrong.tensors[i] = {call.tensors[i].type, true, static_cast<int>(wrong.sizes[i].size()),
                                wrong.sizes[i].data()};
            const bool is_ids = op == Op::kEmbedding && i == 0;
            EXPECT(wrong.refused(attributes, i).empty() == is_ids, "position %d", i);
            wrong = call;
            wrong.tensors[i].is_linear = false;
            EXPECT(has(wrong.refused(attributes, i), "linear format"), "position %d", i);
            wrong = call;
            wrong.tensors[i].type = Type::kOther;
            EXPECT(has(wrong.refused(attributes, i), "expected"), "position %d", i);
          }
        }
  const Attributes linear = attributes_of(Op::kLinear, 300, 77, {2, 4, 8});
  EXPECT(Call(linear, {77}, false).refused(linear, 0).empty() &&
             tokens_of(linear, Call(linear, {77}, false).tensors[0]) == 1,
         "a single row of activations is one token");
  EXPECT(tokens_of(linear, Call(linear, {2, 3, 77}, false).tensors[0]) == 6, "leading sizes multiply");
  const auto tokens = [&](std::vector<int64_t> sizes) {
    return refusal_of([&] { tokens_of(linear, {Type::kFloat16, true, static_cast<int>(sizes.size()), sizes.data()}); });
  };
  EXPECT(has(tokens({-1, 77}), "known sizes"), "an open size has no count");
  EXPECT(has(tokens({int64_t{1} << 20, int64_t{1} << 20, 77}), "2^31"), "a product that overflows");
  EXPECT(!count_refusal(linear, 3, 1).empty() && !count_refusal(linear, 6, 1).empty(), "3 and 6 inputs");
  EXPECT(count_refusal(linear, 4, 1).empty() && count_refusal(linear, 5, 1).empty(), "4 and 5 inputs");
  EXPECT(!count_refusal(linear, 4, 2).empty(), "2 outputs");
  EXPECT(!count_refusal(attributes_of(Op::kEmbedding, 300, 77, {2, 4, 8}), 5, 1).empty(), "an embedding has no bias");
}

void check_tactics() {
  for (const Code& code : kCodes)
    for (const bool allow_int8 : {false, true})
      for (const TokenRange& range : {TokenRange{1, 1, 1}, {1, 8, 16}, {33, 1024, 2048}, {64, 64, 64}}) {
        const Attributes attributes = attributes_of(Op::kLinear, 4096, 1536, code, allow_int8);
        const std::vector<int> ids = tactics_of(attributes, range, kOrin);
        EXPECT(!ids.empty() && std::set<int>(ids.begin(), ids.end()).size() == ids.size(), "%zu tactics", ids.size());
        EXPECT(ids[0] == id_of(tactic_for(attributes, 0, range.likely, kOrin)), "the default is first");
        bool has_int8 = false;
        const std::size_t room = workspace_of(attributes, range, kOrin);
        for (const int id : ids) {
          EXPECT(id > 0 && refusal_of([&] { check_tactic(attributes, id); }).empty(), "tactic %d", id);
          has_int8 |= tactic_for(attributes, id, range.likely, kOrin).activations == Activations::kInt8;
          for (int64_t tokens = range.least; tokens <= range.most; ++tokens)
            EXPECT(workspace_for(attributes, id, tokens, kOrin) <= room, "tactic %d, %d tokens", id, int(tokens));
        }
        EXPECT(has_int8 == (allow_int8 && code.vector == 4), "int8 only where it is allowed and there is a kernel");
        EXPECT(room <= kMostWorkspaceBytes, "%zu bytes", room);
      }
  // Few rows and many columns, which the dispatcher splits.
  const Attributes attributes = attributes_of(Op::kLinear, 256, 8192, {4, 8, 8});
  EXPECT(tactics_of(attributes, {1, 512, 1024}, kOrin).empty(), "a range over both regimes is the dispatcher's");
  const std::size_t room = workspace_of(attributes, {1, 512, 1024}, kOrin);
  for (int64_t tokens = 0; tokens <= 1024; ++tokens)
    EXPECT(workspace_for(attributes, 0, tokens, kOrin) <= room, "%d tokens", int(tokens));
  const std::string small = refusal_of([&] { workspace_of(attributes, {1, 1, 8}, kOrin, 16); });
  EXPECT(room > 16 && has(small, "limit is 16"), "%s", small.c_str());
  const Tactic int8{Regime::kSkinny, Activations::kInt8, 1};
  EXPECT(has(refusal_of([&] { check_tactic(attributes, id_of(int8)); }), "allow_int8"), "int8 without leave");
  EXPECT(!refusal_of([&] { check_tactic(attributes, 12345678); }).empty(), "a number that is no tactic");
  const Tactic skinny{Regime::kSkinny, Activations::kFloat16, 1};
  EXPECT(has(refusal_of([&] { tactic_for(attributes, id_of(skinny), 2048, kOrin); }), "2048"), "too many tokens");
  // A split that one token can afford and 32 cannot: 16 parts of 8192 rows are 16 MiB.
  const Attributes tall = attributes_of(Op::kLinear, 8192, 8192, {4, 8, 8});
  const auto runs_all = [&](const TokenRange& range) {
    const std::vector<int> ids = tactics_of(tall, range, kOrin);
    for (const int id : ids)
      EXPECT(refusal_of([&] { tactic_for(tall, id, range.most, kOrin); }).empty(), "tactic %d of a profile", id);
    return ids.size();
  };
  EXPECT(runs_all({1, 1, 1}) > runs_all({1, 1, 32}) && runs_all({1, 1, 32}) > 0, "fewer tactics for a wider profile");
  const Attributes embedding = attributes_of(Op::kEmbedding, 4096, 1536, {4, 8, 8});
  EXPECT(tactics_of(embedding, {1, 8, 16}, kOrin).empty() && workspace_of(embedding, {1, 8, 16}, kOrin) == 0, "none");
  EXPECT(!refusal_of([&] { check_tactic(embedding, id_of(skinny)); }).empty(), "an embedding has no tactics");
}

void check_devices() {
  const Attributes attributes = attributes_of(Op::kLinear, 4096, 1536, {2, 4, 8});
  EXPECT(has(refusal_of([&] { check_range(attributes, {1, 1, 1}, {75, 40, 64 * 1024}); }), "sm_75"), "an old GPU");
  EXPECT(has(refusal_of([&] { check_range(attributes, {1, 2, 3000000}, kOrin); }), "3000000"), "too many tokens");
  EXPECT(!refusal_of([&] { check_range(attributes, {2, 1, 3}, kOrin); }).empty(), "min above opt");
  EXPECT(refusal_of([&] { check_range(attributes, {1, 8, 2048}, kOrin); }).empty(), "a usual range");

  const char* all = "80 86 87 89 90a 110 120";
  for (const int sm : {80, 86, 87, 89, 90, 110, 120, 121}) EXPECT(architecture_refusal(all, sm).empty(), "sm_%d", sm);
  for (const int sm : {75, 100, 130}) EXPECT(has(architecture_refusal(all, sm), "sm_"), "sm_%d", sm);
  EXPECT(!architecture_refusal("80 86", 87).empty(), "a board runs only its own machine code");
  EXPECT(!architecture_refusal("87", 89).empty(), "a board's machine code runs nowhere else");
  EXPECT(!architecture_refusal("87", 110).empty(), "Orin's library on Thor");
  EXPECT(architecture_refusal("", 87).empty(), "a library that does not say");
}

}  // namespace

int main() {
  check_attributes();
  check_fields();
  check_tensors();
  check_tactics();
  check_devices();
  return report();
}
