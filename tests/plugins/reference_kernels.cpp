// kernels.h on host memory through the reference: what a test of the Python side loads where there is neither a GPU nor an
// emulator. "Device" pointers are host pointers; products are double, so that its error is one rounding.
#include "vq_linear/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "vq_linear/reference.h"

static_assert(sizeof(MgvqSegment) == sizeof(MgvqReferenceSegment) && sizeof(MgvqMatrix) == sizeof(MgvqReferenceMatrix),
              "both headers lay a matrix out alike");
static_assert(offsetof(MgvqSegment, columns) == offsetof(MgvqReferenceSegment, columns) &&
                  offsetof(MgvqSegment, window) == offsetof(MgvqReferenceSegment, window) &&
                  offsetof(MgvqMatrix, segment_count) == offsetof(MgvqReferenceMatrix, segment_count),
              "both headers lay a matrix out alike");

namespace {

thread_local char reason[256] = "";
constexpr int64_t kWorkspace = 64;

cudaError_t refuse(const char* why) {
  std::snprintf(reason, sizeof(reason), "%s", why);
  return cudaErrorInvalidValue;
}

bool is_aligned(const void* pointer, std::size_t bytes) { return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0; }

cudaError_t check(const MgvqMatrix* weight) {
  reason[0] = '\0';
  for (int i = 0; i < weight->segment_count; ++i)
    if (!is_aligned(weight->segments[i].codes, 16) || !is_aligned(weight->segments[i].table, 16))
      return refuse("codes and table must be aligned to 16 bytes");
  return cudaSuccess;
}

const MgvqReferenceMatrix* same(const MgvqMatrix* weight) {
  return reinterpret_cast<const MgvqReferenceMatrix*>(weight);
}

int64_t columns_of(const MgvqMatrix* weight) {
  int64_t sum = 0;
  for (int i = 0; i < weight->segment_count; ++i) sum += weight->segments[i].columns;
  return sum;
}

std::size_t size_of(MgvqType type) { return type == kMgvqFloat16 || type == kMgvqBfloat16 ? 2 : 4; }

float load(const void* data, MgvqType type, int64_t at) {
  if (type == kMgvqFloat32 || type == kMgvqFloat32Scaled) return static_cast<const float*>(data)[at];
  if (type == kMgvqBfloat16) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[at]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  return mgvq_reference_float_from_half(static_cast<const uint16_t*>(data)[at]);
}

// The nearest bfloat16, ties to even, by the two that stand around the value.
uint16_t bfloat_from_float(float value) {
  if (std::isnan(value)) return 0x7fff;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t low = bits & 0xffff0000u, rest = bits & 0xffffu;
  const bool is_up = rest > 0x8000u || (rest == 0x8000u && (low >> 16 & 1));
  return static_cast<uint16_t>((low >> 16) + (is_up ? 1 : 0));
}

void store(void* data, MgvqType type, int64_t at, double value) {
  if (type == kMgvqFloat32)
    static_cast<float*>(data)[at] = static_cast<float>(value);
  else if (type == kMgvqBfloat16)
    static_cast<uint16_t*>(data)[at] = bfloat_from_float(static_cast<float>(value));
  else
    static_cast<uint16_t*>(data)[at] = mgvq_reference_half_from_float(static_cast<float>(value));
}

// What kernels.h says of rows in bf16 and scaled fp32; the power of two that was divided out, NaN of a row that is not finite.
double scale_row(float* row, int64_t columns) {
  float largest = 0.0f;
  for (int64_t i = 0; i < columns; ++i) {
    if (!std::isfinite(row[i])) return std::nan("");
    largest = std::max(largest, std::fabs(row[i]));
  }
  const int exponent = largest == 0.0f ? -100 : std::max(std::ilogb(largest), -100);
  for (int64_t i = 0; i < columns; ++i) row[i] = std::ldexp(row[i], 14 - exponent);
  return std::ldexp(1.0, exponent - 14);
}

}  // namespace

int32_t mgvq_abi() { return kMgvqAbi; }
const char* mgvq_architectures() { return "80 87 90 110"; }
const char* mgvq_reason() { return reason; }

int64_t mgvq_linear_workspace(const MgvqMatrix* weight, MgvqType, int64_t, int32_t) {
  return check(weight) ? -1 : kWorkspace;
}

cudaError_t mgvq_linear(const MgvqMatrix* weight, const void* x, MgvqType x_type, int64_t x_stride, void* y,
                        MgvqType y_type, int64_t y_stride, const void* bias, MgvqType bias_type, int64_t tokens,
                        int32_t tactic, void* workspace, int64_t workspace_size, cudaStream_t) {
  if (check(weight)) return cudaErrorInvalidValue;
  if (tactic != 0) return refuse("no such tactic");
  if (workspace == nullptr || workspace_size < kWorkspace) return refuse("workspace too small");
  if (!is_aligned(x, size_of(x_type)) || !is_aligned(y, size_of(y_type))) return refuse("x and y must be aligned");
  const int64_t columns = columns_of(weight);
  std::vector<float> activations(tokens * columns), offsets(weight->rows, 0.0f);
  for (int64_t i = 0; i < tokens * columns; ++i)
    activations[i] = load(x, x_type, i / columns * x_stride + i % columns);
  std::vector<double> factors(tokens, 1.0);
  if (x_type == kMgvqBfloat16 || x_type == kMgvqFloat32Scaled)
    for (int64_t token = 0; token < tokens; ++token) factors[token] = scale_row(&activations[token * columns], columns);
  mgvq_reference_round_activations(activations.data(), tokens * columns, activations.data());
  for (int64_t row = 0; bias && row < weight->rows; ++row) offsets[row] = load(bias, bias_type, row);
  std::vector<double> product(tokens * weight->rows);
  if (mgvq_reference_linear(same(weight), activations.data(), nullptr, tokens, product.data(), nullptr))
    return refuse(mgvq_reference_reason());
  for (int64_t i = 0; i < tokens * weight->rows; ++i)
    store(y, y_type, i / weight->rows * y_stride + i % weight->rows,
          product[i] * factors[i / weight->rows] + offsets[i % weight->rows]);
  return cudaSuccess;
}

cudaError_t mgvq_dequantize(const MgvqMatrix* weight, void* out, int64_t out_stride, cudaStream_t) {
  if (check(weight)) return cudaErrorInvalidValue;
  const int64_t columns = columns_of(weight);
  std::vector<float> decoded(weight->rows * columns);
  if (mgvq_reference_decode(same(weight), decoded.data())) return refuse(mgvq_reference_reason());
  for (int64_t i = 0; i < weight->rows * columns; ++i)
    store(out, kMgvqFloat16, i / columns * out_stride + i % columns, decoded[i]);
  return cudaSuccess;
}

cudaError_t mgvq_embedding(const MgvqMatrix* weight, const void* ids, MgvqType ids_type, int64_t count, void* out,
                           MgvqType out_type, cudaStream_t) {
  if (check(weight)) return cudaErrorInvalidValue;
  std::vector<int64_t> wide(count);
  for (int64_t i = 0; i < count; ++i)
    wide[i] = ids_type == kMgvqInt64 ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
  const int64_t columns = columns_of(weight);
  std::vector<float> rows(count * columns);
  if (mgvq_reference_embedding(same(weight), wide.data(), count, rows.data())) return refuse(mgvq_reference_reason());
  for (int64_t i = 0; i < count * columns; ++i) store(out, out_type, i, rows[i]);
  return cudaSuccess;
}

cudaError_t mgvq_read(const void* data, int64_t bytes, uint32_t* sink, cudaStream_t) {
  if (bytes % 16) return refuse("bytes must be a multiple of 16");
  *sink = 0;
  for (int64_t at = 0; at < bytes; at += 4) {
    uint32_t word;
    std::memcpy(&word, static_cast<const char*>(data) + at, sizeof(word));
    *sink ^= word;
  }
  return cudaSuccess;
}
