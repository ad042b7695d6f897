#include <algorithm>
#include <limits>

#include "tensorrt/core.h"

namespace mgvq::plugin {

namespace {

std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int i = 0; i < tensor.rank; ++i) text += words(i ? ", %lld" : "%lld", static_cast<long long>(tensor.sizes[i]));
  return text + "]";
}

// "" if the sizes are `expected`, unknown ones aside.
std::string sizes_refusal(const char* name, const Tensor& tensor, const std::vector<int64_t>& expected) {
  bool agrees = tensor.rank == static_cast<int>(expected.size());
  for (int i = 0; agrees && i < tensor.rank; ++i) agrees = tensor.sizes[i] == -1 || tensor.sizes[i] == expected[i];
  if (agrees) return "";
  const Tensor wanted{tensor.type, true, static_cast<int>(expected.size()), expected.data()};
  return words("%s: expected sizes %s, found %s; the graph and its weights are of different runs of `mgvq rewrite`",
               name, shape_text(wanted).c_str(), shape_text(tensor).c_str());
}

const char* input_name(Op op, int position) {
  static constexpr const char* kNames[] = {"x", "codes", "table", "scales", "bias"};
  return op == Op::kEmbedding && position == 0 ? "ids" : kNames[position];
}

std::vector<Type> types_of(const Attributes& attributes, int position, const Tensor* tensors, int inputs) {
  const std::vector<Type> floating{Type::kFloat16, Type::kFloat32};
  const bool is_linear = attributes.op == Op::kLinear;
  // y has the type of x; an embedding has no x, and both types are written.
  if (position == inputs) return is_linear ? std::vector<Type>{tensors[0].type} : floating;
  switch (position) {
    case contract::kLinearInputX: return is_linear ? floating : std::vector<Type>{Type::kInt32, Type::kInt64};
    case contract::kLinearInputCodes: return {Type::kInt8};
    case contract::kLinearInputTable: return {attributes.code.vector == 4 ? Type::kInt8 : Type::kFloat16};
    case contract::kLinearInputScales: return {Type::kFloat16};
    default: return floating;
  }
}

std::string activation_refusal(const Attributes& attributes, const Tensor& activation) {
  const char* name = input_name(attributes.op, 0);
  const int lowest = attributes.op == Op::kLinear ? 1 : 0;
  const int highest = attributes.op == Op::kLinear ? kMostDimensions : kMostDimensions - 1;
  if (activation.rank < lowest || activation.rank > highest)
    return words("%s: expected %d..%d dimensions, found %d", name, lowest, highest, activation.rank);
  if (attributes.op == Op::kEmbedding) return "";
  const int64_t last = activation.sizes[activation.rank - 1];
  if (last == -1 || last == attributes.columns) return "";
  return words("%s: expected the last size to be columns = %d, found %s", name, attributes.columns,
               shape_text(activation).c_str());
}

std::string output_refusal(const Attributes& attributes, const Tensor& activation, const Tensor& output) {
  const int leading = activation.rank - (attributes.op == Op::kLinear ? 1 : 0);
  std::vector<int64_t> expected(activation.sizes, activation.sizes + leading);
  expected.push_back(output_width(attributes));
  // A size that x leaves open may be known of y.
  for (int i = 0; i < leading && i < output.rank; ++i)
    if (expected[i] == -1) expected[i] = output.sizes[i];
  return sizes_refusal("y", output, expected);
}

}  // namespace

std::string count_refusal(const Attributes& attributes, int inputs, int outputs) {
  const bool is_linear = attributes.op == Op::kLinear;
  const int least = is_linear ? contract::kLinearRequiredInputs : contract::kEmbeddingRequiredInputs;
  const int most = is_linear ? contract::kLinearInputs : contract::kEmbeddingInputs;
  if (inputs < least || inputs > most) return words("expected %d..%d inputs, found %d", least, most, inputs);
  if (outputs != 1) return words("expected 1 output, found %d", outputs);
  return "";
}

std::string type_refusal(const Attributes& attributes, int position, const Tensor* tensors, int inputs) {
  const char* name = position == inputs ? "y" : input_name(attributes.op, position);
  const Tensor& tensor = tensors[position];
  const std::vector<Type> expected = types_of(attributes, position, tensors, inputs);
  if (std::find(expected.begin(), expected.end(), tensor.type) == expected.end()) {
    std::string list = name_of(expected[0]);
    for (std::size_t i = 1; i < expected.size(); ++i) list += std::string(" or ") + name_of(expected[i]);
    return words("%s: expected %s, found %s", name, list.c_str(), name_of(tensor.type));
  }
  return tensor.is_linear ? "" : words("%s: expected the linear format, found another", name);
}

std::string shape_refusal(const Attributes& attributes, int position, const Tensor* tensors, int inputs) {
  const Tensor& tensor = tensors[position];
  if (position == 0) return activation_refusal(attributes, tensor);
  if (position == inputs) return output_refusal(attributes, tensors[0], tensor);
  const Code& code = attributes.code;
  const char* name = input_name(attributes.op, position);
  if (position == contract::kLinearInputCodes)
    return sizes_refusal(name, tensor, {codes_bytes(code, attributes.rows, attributes.columns)});
  if (position == contract::kLinearInputTable) return sizes_refusal(name, tensor, {code.entries(), code.vector});
  return sizes_refusal(name, tensor, {attributes.rows});
}

int type_combinations(const Attributes& attributes, int inputs) {
  // Two types of x, each with its y, and two of the bias; two of ids and two of y.
  return attributes.op == Op::kLinear ? (inputs == contract::kLinearInputs ? 4 : 2) : 4;
}

int64_t output_width(const Attributes& attributes) {
  return attributes.op == Op::kLinear ? attributes.rows : attributes.columns;
}

int64_t tokens_of(const Attributes& attributes, const Tensor& activation) {
  constexpr int64_t kMostTokens = std::numeric_limits<int32_t>::max();
  const int leading = activation.rank - (attributes.op == Op::kLinear ? 1 : 0);
  int64_t tokens = 1;
  for (int i = 0; i < leading; ++i) {
    const int64_t size = activation.sizes[i];
    if (size < 0 || (size > 0 && tokens > kMostTokens / size))
      throw Refused(words("%s: expected known sizes with at most 2^31 - 1 tokens, found %s",
                          input_name(attributes.op, 0), shape_text(activation).c_str()));
    tokens *= size;
  }
  return tokens;
}

}  // namespace mgvq::plugin
