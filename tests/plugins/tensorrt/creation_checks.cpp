// Creation from fields, what is serialized, clones, names and timing-cache ids.
#include <unistd.h>

#include <cstdio>
#include <set>

#include "checks.h"
#include "plugin_check.h"
#include "problems.h"

namespace {

using nvinfer1::PluginFieldType;
using nvinfer1::TensorRTPhase;

nvinfer1::IPluginCreatorV3One* creator_of(Library& library, bool is_linear) {
  return is_linear ? library.linear : library.embedding;
}

// "name=value …" in the order given; the fields' types must be int32 of length 1.
std::string text_of(const nvinfer1::PluginFieldCollection* fields) {
  std::string text;
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const nvinfer1::PluginField& field = fields->fields[i];
    const bool is_one = field.type == PluginFieldType::kINT32 && field.length == 1 && field.data;
    text +=
        std::string(field.name) + "=" + (is_one ? std::to_string(*static_cast<const int32_t*>(field.data)) : "?") + " ";
  }
  return text;
}

void check_field_names(Library& library) {
  for (const bool is_linear : {true, false}) {
    std::string names;
    const nvinfer1::PluginFieldCollection* fields = creator_of(library, is_linear)->getFieldNames();
    for (int32_t i = 0; i < fields->nbFields; ++i) names += std::string(fields->fields[i].name) + " ";
    const std::string six = "rows columns vector shift window format_version ";
    check(names == (is_linear ? six + "allow_int8 " : six), "field names: %s", names.c_str());
  }
}

void check_good_fields(Library& library) {
  std::set<std::string> ids;
  int made = 0;
  for (const bool is_linear : {true, false})
    for (const mgvq::Code& code : mgvq::kCodes) {
      const Weight weight = random_weight(code, 200, 72, true, 1);
      const std::string name = std::string(is_linear ? "VQLinear" : "VQEmbedding") + " " + std::to_string(code.vector) +
                               "," + std::to_string(code.shift) + "," + std::to_string(code.window);
      Plugin plugin = create(creator_of(library, is_linear), fields_of(weight));
      check(bool(plugin) && library.logger.take().empty(), "%s is created without a message", name.c_str());
      if (!plugin) continue;
      check(plugin.core && plugin.build && plugin.runtime, "%s has core, build and runtime", name.c_str());
      const std::string stored = text_of(plugin.runtime->getFieldsToSerialize());
      Plugin again(
          creator_of(library, is_linear)
              ->createPlugin("layers.0.q_proj", plugin.runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
      check(bool(again) && text_of(again.runtime->getFieldsToSerialize()) == stored, "%s: serialized and read back: %s",
            name.c_str(), stored.c_str());
      check(again && std::string(again.build->getTimingCacheID()) == plugin.build->getTimingCacheID(),
            "%s: equal attributes, equal timing-cache id", name.c_str());
      Plugin clone(plugin.whole->clone());
      const std::string id = plugin.build->getTimingCacheID();
      plugin = Plugin();
      check(clone && text_of(clone.runtime->getFieldsToSerialize()) == stored && clone.build->getTimingCacheID() == id,
            "%s: a clone outlives what it was made from", name.c_str());
      check(std::string(clone.core->getPluginName()) == creator_of(library, is_linear)->getPluginName() &&
                std::string(clone.core->getPluginVersion()) == "1" &&
                std::string(clone.core->getPluginNamespace()).empty(),
            "%s: name, version and namespace are the creator's", name.c_str());
      if (is_linear) ids.insert(id);
      ++made;
    }
  const Weight weight = random_weight({4, 8, 8}, 200, 72, true, 1);
  for (Fields other :
       {fields_of(weight).set("rows", 201), fields_of(weight).set("columns", 73), fields_of(weight, true)})
    ids.insert(create(library.linear, other).build->getTimingCacheID());
  check(ids.size() == mgvq::kCodeCount + 3, "timing-cache ids differ with each attribute: %zu of %d", ids.size(), made);

  Fields wide;
  for (const auto& [name, value] :
       {std::pair{"rows", 200}, {"columns", 72}, {"vector", 4}, {"shift", 8}, {"window", 8}, {"format_version", 1}})
    wide.set(name, value, PluginFieldType::kINT64);
  const Plugin from_wide = create(library.linear, wide), from_narrow = create(library.linear, fields_of(weight));
  check(from_wide &&
            text_of(from_wide.runtime->getFieldsToSerialize()) == text_of(from_narrow.runtime->getFieldsToSerialize()),
        "int64 fields are taken");
  const Plugin with_other = create(library.linear, fields_of(weight).set("plugin_colour", 3));
  const std::string said = library.logger.take();
  check(bool(with_other) && has(said, "plugin_colour") && has(said, "ignored"), "an unknown field is ignored aloud: %s",
        said.c_str());
}

// Nothing is made, and the message names the layer and what is wrong.
void check_refused(Library& library, bool is_linear, Fields fields, const std::string& what, const std::string& word) {
  library.logger.take();
  const Plugin plugin = create(creator_of(library, is_linear), std::move(fields));
  const bool is_error =
      !library.logger.messages.empty() && library.logger.messages[0].severity == nvinfer1::ILogger::Severity::kERROR;
  std::string said = library.logger.take();
  if (!said.empty()) said.pop_back();
  check(!plugin && is_error && has(said, what) && has(said, word) && has(said, "layers.0.q_proj"), "refused: %s",
        said.c_str());
}

// What `body` writes to stderr.
template <typename Body>
std::string stderr_of(Body&& body) {
  std::FILE* const file = std::tmpfile();
  const int kept = dup(STDERR_FILENO);
  if (!file || kept < 0) return "";
  dup2(fileno(file), STDERR_FILENO);
  body();
  dup2(kept, STDERR_FILENO);
  close(kept);
  char text[2048];
  std::rewind(file);
  const std::size_t length = std::fread(text, 1, sizeof text, file);
  std::fclose(file);
  return std::string(text, length);
}

void check_bad_fields(Library& library) {
  const Weight weight = random_weight({2, 4, 8}, 200, 72, true, 1);
  for (const bool is_linear : {true, false}) {
    for (const char* name : {"rows", "columns", "vector", "shift", "window", "format_version"}) {
      check_refused(library, is_linear, fields_of(weight).drop(name), name, "missing");
      check_refused(library, is_linear, fields_of(weight).set(name, 1, PluginFieldType::kFLOAT32), name, "type");
      check_refused(library, is_linear, fields_of(weight).set(name, 1, PluginFieldType::kINT32, 2), name, "found 2");
      check_refused(library, is_linear, fields_of(weight).set(name, 0), name, "found 0");
      check_refused(library, is_linear, fields_of(weight).set(name, -5), name, "found -5");
      check_refused(library, is_linear, fields_of(weight).set(name, int64_t{1} << 40, PluginFieldType::kINT64), name,
                    "1099511627776");
    }
    check_refused(library, is_linear, fields_of(weight).set("shift", 7), "vector, shift, window", "(2,7,8)");
    check_refused(library, is_linear, fields_of(weight).set("format_version", 2).set("rows", -1), "format_version",
                  "newer");
    check_refused(library, is_linear, Fields(), "rows", "missing");
  }
  check_refused(library, true, fields_of(weight).set("allow_int8", 2), "allow_int8", "found 2");
  check_refused(library, true, fields_of(weight).set("rows", (int64_t{1} << 31) - 1), "rows", "2^30");

  const Plugin from_null(library.linear->createPlugin(nullptr, nullptr, TensorRTPhase::kRUNTIME));
  check(!from_null && has(library.logger.take(), "missing"), "neither name nor fields: refused, not a crash");
  library.finder.throws = true;
  Plugin unheard;
  const std::string printed = stderr_of([&] { unheard = create(library.linear, Fields()); });
  library.finder.throws = false;
  check(!unheard && library.logger.take().empty() && has(printed, "rows") && has(printed, "missing"),
        "a finder that throws: the refusal stands, on stderr");
}

}  // namespace

void check_creation(Library& library) {
  check_field_names(library);
  check_good_fields(library);
  check_bad_fields(library);
}
