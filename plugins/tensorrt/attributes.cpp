#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <limits>

#include "tensorrt/core.h"

namespace mgvq::plugin {

namespace {

constexpr int32_t kMostSize = std::numeric_limits<int32_t>::max();

int64_t number_in(const Field& field) {
  if (field.type != Type::kInt32 && field.type != Type::kInt64)
    throw Refused(words("attribute %s: expected an int32 or int64, found another type", field.name));
  if (field.length != 1 || field.data == nullptr)
    throw Refused(words("attribute %s: expected one number, found %d", field.name, field.data ? field.length : 0));
  if (field.type == Type::kInt64) return *static_cast<const int64_t*>(field.data);
  return *static_cast<const int32_t*>(field.data);
}

int32_t in_range(const char* name, int64_t value, int64_t lowest, int64_t highest) {
  if (value >= lowest && value <= highest) return static_cast<int32_t>(value);
  throw Refused(words("attribute %s: expected a number in %lld..%lld, found %lld", name, static_cast<long long>(lowest),
                      static_cast<long long>(highest), static_cast<long long>(value)));
}

void check_version(int64_t version) {
  if (version == contract::kFormatVersion) return;
  if (version > contract::kFormatVersion)
    throw Refused(
        words("attribute format_version: this library reads version %d, found the newer %lld; build the plugin "
              "from the mgvq that wrote the graph",
              contract::kFormatVersion, static_cast<long long>(version)));
  throw Refused(words("attribute format_version: expected %d, found %lld; run `mgvq rewrite` again",
                      contract::kFormatVersion, static_cast<long long>(version)));
}

std::string known_codes() {
  std::string list;
  for (const Code& code : kCodes) list += words(" (%d,%d,%d)", code.vector, code.shift, code.window);
  return list;
}

void check_code(const Code& code) {
  if (is_known(code)) return;
  throw Refused(
      words("attributes vector, shift, window: expected one of%s, found (%d,%d,%d); quantize with a code of this "
            "list, or build the plugin from a newer mgvq",
            known_codes().c_str(), code.vector, code.shift, code.window));
}

// The value of every name of attribute_names; the optional last one is 0 where it is absent.
std::vector<int64_t> values_of(Op op, const Field* fields, int count, std::vector<std::string>* ignored) {
  const std::vector<const char*> names = attribute_names(op);
  std::vector<int64_t> values(names.size(), 0);
  std::vector<bool> is_given(names.size(), false);
  for (int i = 0; i < count; ++i) {
    if (fields[i].name == nullptr) throw Refused("a field without a name");
    const auto same = [&](const char* name) { return std::strcmp(name, fields[i].name) == 0; };
    const auto place = std::find_if(names.begin(), names.end(), same) - names.begin();
    if (place == static_cast<std::ptrdiff_t>(names.size())) {
      if (ignored != nullptr) ignored->push_back(fields[i].name);
      continue;
    }
    if (is_given[place]) throw Refused(words("attribute %s: given twice", fields[i].name));
    is_given[place] = true;
    values[place] = number_in(fields[i]);
  }
  for (int i = 0; i < contract::kRequiredAttributes; ++i)
    if (!is_given[i])
      throw Refused(words("attribute %s is missing; a device graph of `mgvq rewrite` has all %d", names[i],
                          contract::kRequiredAttributes));
  return values;
}

}  // namespace

std::string words(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return text;
}

const char* name_of(Op op) { return op == Op::kLinear ? contract::kLinearName : contract::kEmbeddingName; }

const char* name_of(Type type) {
  static constexpr const char* kNames[] = {"float16", "float32", "int8", "int32", "int64", "another type"};
  return kNames[static_cast<int>(type)];
}

std::vector<const char*> attribute_names(Op op) {
  std::vector<const char*> names{contract::kAttributeRows,   contract::kAttributeColumns,
                                 contract::kAttributeVector, contract::kAttributeShift,
                                 contract::kAttributeWindow, contract::kAttributeFormatVersion};
  if (op == Op::kLinear) names.push_back(contract::kAttributeAllowInt8);
  return names;
}

std::vector<int32_t> numbers_of(const Attributes& attributes) {
  std::vector<int32_t> numbers{attributes.rows,       attributes.columns,     attributes.code.vector,
                               attributes.code.shift, attributes.code.window, attributes.format_version};
  if (attributes.op == Op::kLinear) numbers.push_back(attributes.allow_int8 ? 1 : 0);
  return numbers;
}

Attributes attributes_from(Op op, const Field* fields, int count, std::vector<std::string>* ignored) {
  const std::vector<int64_t> values = values_of(op, fields, count, ignored);
  const std::vector<const char*> names = attribute_names(op);
  // First, since another version may give the other numbers another meaning.
  check_version(values[5]);
  const auto small = [&](int i) { return in_range(names[i], values[i], 1, 64); };
  Attributes attributes{};
  attributes.op = op;
  attributes.rows = in_range(names[0], values[0], 1, kMostSize);
  attributes.columns = in_range(names[1], values[1], 1, kMostSize);
  attributes.code = {small(2), small(3), small(4)};
  attributes.format_version = static_cast<int32_t>(values[5]);
  if (op == Op::kLinear) attributes.allow_int8 = in_range(names[6], values[6], 0, 1) != 0;
  check_code(attributes.code);
  if (const char* why = refusal(problem_of(attributes, 1), 0)) throw Refused(why);
  return attributes;
}

std::string description_of(const Attributes& attributes) {
  return words("rows=%d columns=%d code=%d,%d,%d format=%d int8=%d", attributes.rows, attributes.columns,
               attributes.code.vector, attributes.code.shift, attributes.code.window, attributes.format_version,
               attributes.allow_int8 ? 1 : 0);
}

}  // namespace mgvq::plugin
