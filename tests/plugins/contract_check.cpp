// What the plugin may take for granted about the op contract, checked when it compiles.
#include "vq_linear/contract.h"

namespace c = mgvq::contract;

static_assert(c::kFormatVersion >= 1, "the weight format has a version");
static_assert(c::kPluginNamespace[0] == '\0', "TensorRT before 10.10 finds plugins in the empty namespace only");
static_assert(c::kPluginVersion[0] != '\0', "plugin_version is always written");
static_assert(c::kRowGroup % 32 == 0 && c::kColumnGroup % 16 == 0, "a row group and column group fill whole mma tiles");

// Activations come first and the weight's three tensors follow in the same order in both ops.
static_assert(c::kLinearInputX == 0 && c::kEmbeddingInputIds == 0);
static_assert(c::kLinearInputCodes == c::kEmbeddingInputCodes);
static_assert(c::kLinearInputTable == c::kEmbeddingInputTable);
static_assert(c::kLinearInputScales == c::kEmbeddingInputScales);

// Only the bias is optional, and it is last.
static_assert(c::kLinearInputBias == c::kLinearRequiredInputs && c::kLinearInputs == c::kLinearRequiredInputs + 1);
static_assert(c::kEmbeddingInputs == c::kEmbeddingRequiredInputs);

int main() { return 0; }
