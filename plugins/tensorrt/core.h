// What the plugins decide, free of TensorRT and of CUDA, so that any C++17 compiler builds and tests it: fields to
// attributes, which tensors are taken, shapes, tactics, workspace, and the words of every refusal. plugin.h puts
// TensorRT's interfaces over it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "vq_linear/contract.h"
#include "vq_linear/dispatch.h"

namespace mgvq::plugin {

// What was expected, what was found, and what to do. Thrown inside the shell and caught at its boundary.
class Refused : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// printf into a string.
[[gnu::format(printf, 1, 2)]] std::string words(const char* format, ...);

enum class Op { kLinear, kEmbedding };
const char* name_of(Op op);

enum class Type { kFloat16, kFloat32, kInt8, kInt32, kInt64, kOther };
const char* name_of(Type type);

// A tensor as TensorRT describes it. `sizes` [rank]; -1 where a size is not known yet. `is_linear`: rows one after
// another.
struct Tensor {
  Type type;
  bool is_linear;
  int rank;
  const int64_t* sizes;
};

// TensorRT's limit on dimensions.
inline constexpr int kMostDimensions = 8;

// A plugin field: `length` numbers of `type` at `data`; type is kOther unless int32 or int64.
struct Field {
  const char* name;
  Type type;
  const void* data;
  int length;
};

// The attributes of a node, checked: rows and columns in 1..2^31 - 1, a code that has kernels, a format version we
// read.
struct Attributes {
  Op op;
  int32_t rows, columns;
  Code code;
  int32_t format_version;
  bool allow_int8;  // VQLinear: tactics may round activations to int8, which changes results
};

// The attributes' names in the order of `numbers_of`: the contract's required ones, and for VQLinear allow_int8 behind
// them.
std::vector<const char*> attribute_names(Op op);

// The numbers behind the names; attributes_from reads them back to an equal value.
std::vector<int32_t> numbers_of(const Attributes& attributes);

// Attributes from int32 or int64 fields in any order. Names of fields that nobody asked for are added to `ignored`.
// Throws Refused: a field is missing, given twice, of another type or length, out of range; the code has no kernel;
// format_version is another.
Attributes attributes_from(Op op, const Field* fields, int count, std::vector<std::string>* ignored);

// The dispatcher's view of that many tokens.
Problem problem_of(const Attributes& attributes, int64_t tokens);

// "rows=… columns=… code=V,k,L format=… int8=…": equal for equal attributes, different for others.
std::string description_of(const Attributes& attributes);

// Positions count the inputs in the contract's order, then the output. Refusals are "" or the reason; they look at
// tensors[0..position] alone, since TensorRT has not filled in those behind.
std::string count_refusal(const Attributes& attributes, int inputs, int outputs);
std::string type_refusal(const Attributes& attributes, int position, const Tensor* tensors, int inputs);
std::string shape_refusal(const Attributes& attributes, int position, const Tensor* tensors, int inputs);

// How many combinations of types type_refusal accepts for that number of inputs.
int type_combinations(const Attributes& attributes, int inputs);

// The last size of the output: rows for VQLinear, columns for VQEmbedding.
int64_t output_width(const Attributes& attributes);

// Rows of x (the product of all sizes but the last) or ids. Throws Refused: a size is unknown, or there are too many.
int64_t tokens_of(const Attributes& attributes, const Tensor& activation);

// Tokens of an optimization profile.
struct TokenRange {
  int64_t least, likely, most;
};

// Throws Refused unless every number of tokens of the range has a kernel on the device.
void check_range(const Attributes& attributes, const TokenRange& range, const Device& device);

// Tactic numbers worth timing at `range.likely`, the default first, each able to run the whole range. Empty for
// VQEmbedding, and where the range spans both regimes: a time taken at one count says nothing about the other regime,
// so the dispatcher chooses by the count of each call (tactic 0).
std::vector<int> tactics_of(const Attributes& attributes, const TokenRange& range, const Device& device);

// Throws Refused unless `id` is 0 or names a tactic that these attributes permit.
void check_tactic(const Attributes& attributes, int id);

// The tactic of a call; `id` 0 is the dispatcher's choice. Throws Refused: the tactic cannot run that many tokens.
Tactic tactic_for(const Attributes& attributes, int id, int64_t tokens, const Device& device);

inline constexpr std::size_t kMostWorkspaceBytes = std::size_t{8} << 20;

// Bytes of workspace of one call, and the most that any call of up to range.most tokens takes with any tactic of
// tactics_of or the default. Throws Refused above `limit`.
std::size_t workspace_for(const Attributes& attributes, int id, int64_t tokens, const Device& device);
std::size_t workspace_of(const Attributes& attributes, const TokenRange& range, const Device& device,
                         std::size_t limit = kMostWorkspaceBytes);

// "" if machine code for one of `architectures` ("80 86 87 90a") runs on `sm`: same major version, no newer minor one;
// boards need their own. "" too where the library does not say what it carries.
std::string architecture_refusal(const std::string& architectures, int sm);

}  // namespace mgvq::plugin
