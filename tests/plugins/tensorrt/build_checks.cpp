// Output types and shapes, format combinations, and planning: tactics and workspace of a profile.
#include <algorithm>
#include <set>

#include "checks.h"
#include "plugin_check.h"
#include "problems.h"
#include "vq_linear/dispatch.h"

namespace {

using nvinfer1::DataType;
using nvinfer1::TensorFormat;

constexpr int kTypes = 10;  // DataType's values up to kINT4; newer ones only exist in newer headers
constexpr int kFormats = 13;

void check_output_types(Library& library) {
  const Weight weight = random_weight({2, 4, 8}, 200, 72, true, 1);
  const Plugin linear = create(library.linear, fields_of(weight)),
               embedding = create(library.embedding, fields_of(weight));
  for (const DataType type : {DataType::kHALF, DataType::kFLOAT}) {
    const DataType inputs[] = {type, DataType::kINT8, DataType::kHALF, DataType::kHALF};
    DataType output{};
    check(linear.build->getOutputDataTypes(&output, 1, inputs, 4) == 0 && output == type, "y has the type of x");
  }
  const DataType inputs[] = {DataType::kINT64, DataType::kINT8, DataType::kHALF, DataType::kHALF};
  DataType output{};
  check(embedding.build->getOutputDataTypes(&output, 1, inputs, 4) == 0 && output == DataType::kFLOAT,
        "rows of an embedding are float32");
  check(linear.build->getOutputDataTypes(&output, 1, inputs, 3) != 0 && has(library.logger.take(), "found 3"),
        "three inputs are refused");
  check(linear.build->getNbOutputs() == 1 && embedding.build->getNbOutputs() == 1, "one output");
}

// The output's sizes, -1 for those that are x's; empty where they were refused.
std::vector<int64_t> shape_of(const Plugin& plugin, const Weight& weight, const std::vector<int64_t>& activation,
                              int64_t codes, int32_t inputs = 4, bool* are_same = nullptr) {
  Sizes sizes;
  std::vector<nvinfer1::DimsExprs> in{sizes.expressions(activation),
                                      sizes.expressions({codes}),
                                      sizes.expressions({weight.code.entries(), weight.code.vector}),
                                      sizes.expressions({weight.rows}),
                                      sizes.expressions({weight.rows}),
                                      sizes.expressions({1})};
  nvinfer1::DimsExprs out{};
  if (plugin.build->getOutputShapes(in.data(), inputs, nullptr, 0, &out, 1, sizes.builder()) != 0) return {};
  std::vector<int64_t> found;
  for (int i = 0; i < out.nbDims; ++i) found.push_back(out.d[i]->isConstant() ? out.d[i]->getConstantValue() : -1);
  // Leading sizes are x's own expressions, so that TensorRT knows them equal.
  for (int i = 0; are_same && i + 1 < out.nbDims; ++i) *are_same &= out.d[i] == in[0].d[i];
  return found;
}

void check_output_shapes(Library& library) {
  const Weight weight = random_weight({2, 4, 8}, 200, 72, true, 1);
  const auto codes = static_cast<int64_t>(weight.codes.size());
  const Plugin linear = create(library.linear, fields_of(weight)),
               embedding = create(library.embedding, fields_of(weight));
  for (const std::vector<int64_t>& leading : {std::vector<int64_t>{}, {7}, {-1}, {2, -1}, {1, 3, 5}, {-1, -1, -1, 2}}) {
    std::vector<int64_t> x = leading, y = leading, rows = leading;
    x.push_back(72), y.push_back(200), rows.push_back(72);
    bool are_same = true;
    check(shape_of(linear, weight, x, codes, 4, &are_same) == y && are_same, "x of rank %zu gives y", x.size());
    x.back() = -1;
    check(shape_of(linear, weight, x, -1, 5, &are_same) == y && are_same, "the same with open sizes and a bias");
    check(shape_of(embedding, weight, leading, codes, 4, &are_same) == rows && are_same, "ids of rank %zu give rows",
          leading.size());
  }
  check(library.logger.take().empty(), "no message for right shapes");
  const auto refused = [&](const Plugin& plugin, const std::vector<int64_t>& x, int64_t length, int inputs,
                           const char* word) {
    const bool is_refused = shape_of(plugin, weight, x, length, inputs).empty();
    std::string said = library.logger.take();
    if (!said.empty()) said.pop_back();
    check(is_refused && has(said, word), "refused: %s", said.c_str());
  };
  refused(linear, {5, 73}, codes, 4, "columns = 72");
  refused(linear, {}, codes, 4, "dimensions");
  refused(linear, {5, 72}, codes + 1, 4, "codes");
  refused(linear, {5, 72}, codes, 3, "found 3");
  refused(linear, {5, 72}, codes, 6, "found 6");
  refused(embedding, {1, 1, 1, 1, 1, 1, 1, 1}, codes, 4, "0..7 dimensions");
  refused(embedding, {5}, codes, 5, "found 5");
}

// Every type and format at every position: taken if and only if it is one of the contract's.
void check_formats_of(Library& library, const Weight& weight, bool is_linear, bool has_bias) {
  const DataType half = DataType::kHALF, floating = DataType::kFLOAT;
  const Plugin plugin = create(is_linear ? library.linear : library.embedding, fields_of(weight));
  const Call call = call_of(weight, {5}, is_linear ? half : DataType::kINT64, is_linear ? half : floating,
                            has_bias ? &floating : nullptr);
  std::vector<nvinfer1::DynamicPluginTensorDesc> tensors = profile_of(call, 1, 5, 9);
  std::vector<std::set<DataType>> taken{
      is_linear ? std::set<DataType>{half, floating} : std::set<DataType>{DataType::kINT32, DataType::kINT64},
      {DataType::kINT8},
      {weight.code.vector == 4 ? DataType::kINT8 : half},
      {half}};
  if (has_bias) taken.push_back({half, floating});
  taken.push_back(is_linear ? std::set<DataType>{half} : std::set<DataType>{half, floating});
  for (int position = 0; position <= call.inputs; ++position) {
    int wrong = 0;
    for (int type = 0; type < kTypes; ++type)
      for (int format = 0; format < kFormats; ++format) {
        auto probed = tensors;
        probed[position].desc.type = static_cast<DataType>(type);
        probed[position].desc.format = static_cast<TensorFormat>(format);
        // What lies behind has no meaning yet.
        for (int i = position + 1; i <= call.inputs; ++i)
          probed[i].desc.type = DataType::kBOOL, probed[i].desc.dims.nbDims = -1;
        const bool expected = format == 0 && taken[position].count(static_cast<DataType>(type)) == 1;
        wrong += plugin.build->supportsFormatCombination(position, probed.data(), call.inputs, 1) != expected;
      }
    library.logger.take();
    check(wrong == 0, "%s (%d,%d,%d), %d inputs, position %d: all %d combinations of type and format",
          plugin.core->getPluginName(), weight.code.vector, weight.code.shift, weight.code.window, call.inputs,
          position, kTypes * kFormats);
  }
}

void check_formats(Library& library) {
  const Weight half_table = random_weight({2, 4, 8}, 200, 72, true, 1),
               int8_table = random_weight({4, 8, 8}, 200, 72, true, 1);
  for (const Weight* weight : {&half_table, &int8_table}) {
    check_formats_of(library, *weight, true, false);
    check_formats_of(library, *weight, true, true);
    check_formats_of(library, *weight, false, false);
  }
  const Plugin plugin = create(library.linear, fields_of(half_table));
  const Call call = call_of(half_table, {5}, DataType::kHALF, DataType::kFLOAT);
  auto tensors = profile_of(call, 1, 5, 9);
  library.logger.take();
  const bool takes_other = plugin.build->supportsFormatCombination(4, tensors.data(), 4, 1);
  const bool is_quiet =
      library.logger.messages.size() == 1 && library.logger.messages[0].severity == nvinfer1::ILogger::Severity::kINFO;
  check(!takes_other && is_quiet && has(library.logger.take(), "float16"),
        "y of another type than x is not taken, which is an answer and no warning");
  tensors[1].desc.dims.d[0] += 16;
  const bool is_taken = plugin.build->supportsFormatCombination(1, tensors.data(), 4, 1);
  std::string said = library.logger.take();
  check(!is_taken && has(said, "codes") && has(said, std::to_string(half_table.codes.size())), "refused: %s",
        said.c_str());
  check(!plugin.build->supportsFormatCombination(5, tensors.data(), 4, 1), "a position behind the output");
  check(!plugin.build->supportsFormatCombination(0, tensors.data(), 7, 1), "seven inputs");
  check(plugin.build->getFormatCombinationLimit() == 4, "four combinations of types: x and bias");
  library.logger.take();
}

std::vector<int32_t> tactics_of(const Plugin& plugin) {
  std::vector<int32_t> tactics(static_cast<std::size_t>(plugin.build->getNbTactics()));
  const int32_t status = plugin.build->getValidTactics(tactics.data(), static_cast<int32_t>(tactics.size()));
  return status == 0 ? tactics : std::vector<int32_t>{-1};
}

std::size_t workspace_of(const Plugin& plugin, const std::vector<nvinfer1::DynamicPluginTensorDesc>& tensors) {
  return plugin.build->getWorkspaceSize(tensors.data(), static_cast<int32_t>(tensors.size()) - 1, &tensors.back(), 1);
}

// The most that the tactics take for any number of tokens they can run; the dispatcher's figures depend on no device.
std::size_t most_needed(const Weight& weight, const std::vector<int32_t>& tactics, int64_t tokens_at_most) {
  constexpr mgvq::Device kAny{87, 8, 163 * 1024};
  std::size_t most = 0;
  for (int64_t tokens = 1; tokens <= tokens_at_most; ++tokens) {
    const mgvq::Problem problem{tokens, weight.rows, 1, {{weight.code, weight.columns}}};
    for (const int32_t id : tactics) {
      mgvq::Tactic tactic{};
      if (mgvq::tactic_from_id(id, &tactic) && mgvq::is_valid(tactic, problem, kAny))
        most = std::max(most, mgvq::workspace_bytes(problem, kAny, tactic));
    }
  }
  return most;
}

// Tactics and workspace of one profile; the workspace against the dispatcher's own figures for an Orin-like device.
void check_profile(Library& library, const Weight& weight, bool allow_int8, int64_t least, int64_t likely,
                   int64_t most) {
  const Plugin plugin = create(library.linear, fields_of(weight, allow_int8));
  const auto tensors = profile_of(call_of(weight, {most}, DataType::kHALF, DataType::kHALF), least, likely, most);
  library.logger.take();
  check(configure(plugin, tensors) == 0, "a profile of %d..%d tokens is taken %s", int(least), int(most),
        library.logger.take().c_str());
  const std::vector<int32_t> tactics = tactics_of(plugin);
  const std::set<int32_t> unique(tactics.begin(), tactics.end());
  const bool is_mixed = least <= 32 && most > 32;
  check(unique.size() == tactics.size() && unique.count(0) == 0 && unique.count(-1) == 0 && tactics.empty() == is_mixed,
        "%zu tactics, all different, none 0", tactics.size());
  bool has_int8 = false, are_settable = true;
  for (const int32_t tactic : tactics) {
    mgvq::Tactic read{};
    are_settable &= mgvq::tactic_from_id(tactic, &read) && plugin.runtime->setTactic(tactic) == 0;
    has_int8 |= read.activations == mgvq::Activations::kInt8;
  }
  check(are_settable && has_int8 == (allow_int8 && weight.code.vector == 4 && !is_mixed),
        "each can be set; int8 activations only where the node allows them");
  const std::size_t found = workspace_of(plugin, tensors), needed = most_needed(weight, tactics, most);
  check(found >= needed && found <= std::size_t{8} << 20,
        "%zu bytes of workspace, of which these tactics use up to %zu", found, needed);
  check(plugin.build->getValidTactics(nullptr, static_cast<int32_t>(tactics.size()) + 1) != 0,
        "another room is refused");
  library.logger.take();
}

}  // namespace

void check_shapes_and_formats(Library& library) {
  check_output_types(library);
  check_output_shapes(library);
  check_formats(library);
}

void check_planning(Library& library) {
  const Weight half_table = random_weight({2, 4, 8}, 256, 2048, true, 1),
               int8_table = random_weight({4, 8, 8}, 256, 2048, true, 1);
  for (const Weight* weight : {&half_table, &int8_table})
    for (const bool allow_int8 : {false, true}) {
      check_profile(library, *weight, allow_int8, 1, 1, 1);
      check_profile(library, *weight, allow_int8, 1, 4, 8);
      check_profile(library, *weight, allow_int8, 64, 512, 2048);
      check_profile(library, *weight, allow_int8, 1, 512, 2048);
    }
  const Plugin plugin = create(library.linear, fields_of(half_table));
  const Call call = call_of(half_table, {8}, DataType::kHALF, DataType::kHALF);
  const auto refused = [&](const std::vector<nvinfer1::DynamicPluginTensorDesc>& tensors, const char* word) {
    const bool is_refused = configure(plugin, tensors) != 0;
    std::string said = library.logger.take();
    if (!said.empty()) said.pop_back();
    check(is_refused && has(said, word), "refused: %s", said.c_str());
  };
  library.logger.take();
  refused(profile_of(call, 1, 8, 3000000), "3000000 tokens");
  refused(profile_of(call, 1, 8, -1), "known sizes");
  refused(profile_of(call, 9, 8, 8), "min <= opt <= max");
  auto tensors = profile_of(call, 1, 4, 8);
  tensors[3].desc.type = DataType::kFLOAT;
  refused(tensors, "scales: expected float16, found float32");
  check(configure(plugin, profile_of(call, 1, 4, 8)) == 0, "a right profile after wrong ones");
  check(plugin.runtime->setTactic(987654321) != 0 && has(library.logger.take(), "987654321"), "no such tactic");
  const int int8 = mgvq::id_of({mgvq::Regime::kSkinny, mgvq::Activations::kInt8, 1});
  check(plugin.runtime->setTactic(int8) != 0 && has(library.logger.take(), "allow_int8"), "int8 without leave");

  const Plugin embedding = create(library.embedding, fields_of(half_table));
  const auto rows = profile_of(call_of(half_table, {8}, DataType::kINT64, DataType::kFLOAT), 1, 8, 3000000);
  check(configure(embedding, rows) == 0 && embedding.build->getNbTactics() == 0 && workspace_of(embedding, rows) == 0,
        "an embedding has no tactics, no workspace, and no limit on tokens");
  check(embedding.runtime->setTactic(0) == 0 && embedding.runtime->setTactic(5) != 0, "its only tactic is 0");
  library.logger.take();
}

void check_planning_without_device(Library& library) {
  const Weight weight = random_weight({2, 4, 8}, 256, 2048, true, 1);
  const Plugin plugin = create(library.linear, fields_of(weight));
  const Call call = call_of(weight, {8}, DataType::kHALF, DataType::kHALF);
  const auto refused = [&](bool is_refused, const char* entry) {
    std::string said = library.logger.take();
    if (!said.empty()) said.pop_back();
    check(is_refused && has(said, "CUDA device"), "%s without a device: %s", entry, said.c_str());
  };
  library.logger.take();
  refused(configure(plugin, profile_of(call, 1, 4, 8)) != 0, "configurePlugin");
  refused(prepare(plugin, call) != 0, "onShapeChange");
  Resources resources;
  refused(plugin.runtime->attachToContext(&resources) == nullptr, "attachToContext");
}
