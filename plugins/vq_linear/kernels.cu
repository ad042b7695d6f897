// The launchers of kernels.h: arguments checked in words, then one kernel a segment and, where columns were split, one more
// that adds the parts up in a fixed order.
#include "vq_linear/kernels.h"

#include <cstdio>

#include "vq_linear/dispatch.h"
#include "vq_linear/linear.h"
#include "vq_linear/reason.h"

namespace mgvq {

thread_local char reason_text[256] = "";

namespace {

constexpr int kScaleThreads = 256;

// scale[token] = max |x[token, :]| / 127 over all segments' columns, 0 for a token of zeros.
MGVQ_KERNEL(kScaleThreads, 1) token_scales_kernel(Activation x, float* scales) {
  const int64_t token = MGVQ_BLOCK;
  float largest = 0.0f;
  for (int64_t column = 2 * MGVQ_THREAD; column < x.columns; column += 2 * MGVQ_THREADS) {
    const uint32_t pair = activation_pair(x, token, column);
    const float low = float_of_half(static_cast<uint16_t>(pair)), high = float_of_half(static_cast<uint16_t>(pair >> 16));
    largest = low > largest ? low : -low > largest ? -low : largest;
    largest = high > largest ? high : -high > largest ? -high : largest;
  }
  put_shared(4 * MGVQ_THREAD, bits_of_float(largest));
  sync_threads();
  if (MGVQ_THREAD == 0) {
    for (int i = 1; i < kScaleThreads; ++i) {
      const float other = float_from_bits(shared_word(4 * i));
      largest = other > largest ? other : largest;
    }
    scales[token] = largest / 127.0f;
  }
}

// y = bias + Σ over slots of partial[slot][token][row], slots in order.
MGVQ_KERNEL(256, 1) reduce_kernel(const float* partial, int slots, Output y, int64_t rows, int64_t tokens) {
  const int64_t row = int64_t{MGVQ_BLOCK} * 256 + MGVQ_THREAD, token = MGVQ_BLOCK_Y;
  if (row >= rows) return;
  float sum = 0.0f;
  for (int slot = 0; slot < slots; ++slot) sum += partial[(slot * tokens + token) * rows + row];
  store(y, token, row, sum + bias_of(y, row));
}

const CodeLaunchers* launchers_of(const Code& code) {
  const CodeLaunchers* const all[kCodeCount] = {&launchers_4_8_8, &launchers_2_6_6, &launchers_2_8_8,
                                                &launchers_2_3_8, &launchers_2_4_8, &launchers_2_5_8,
                                                &launchers_2_6_8, &launchers_2_8_9, &launchers_4_8_9};
  for (int i = 0; i < kCodeCount; ++i)
    if (kCodes[i] == code) return all[i];
  return nullptr;
}

bool current_device(Device* out) {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, device) == cudaSuccess;
  };
  const bool known = ask(&major, cudaDevAttrComputeCapabilityMajor) && ask(&minor, cudaDevAttrComputeCapabilityMinor) &&
                     ask(&out->multiprocessors, cudaDevAttrMultiProcessorCount) &&
                     ask(&out->shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  out->sm = 10 * major + minor;
  return known;
}

// The problem, device and tactic of a call; nullptr, or why it is refused.
const char* resolve(const MgvqMatrix* weight, int64_t tokens, int32_t tactic_id, Problem* problem, Device* device,
                    Tactic* tactic) {
  if (const char* reason = problem_of(weight, tokens, problem)) return reason;
  if (!current_device(device)) return "there is no CUDA device, or its attributes cannot be read";
  if (const char* reason = refusal(*problem, device->sm)) return reason;
  if (tactic_id == 0) {
    *tactic = default_tactic(*problem, *device);
    return nullptr;
  }
  if (!tactic_from_id(tactic_id, tactic) || !is_valid(*tactic, *problem, *device))
    return "the tactic is none of valid_tactics for this problem and device; pass 0 for the default";
  return nullptr;
}

const char* check_pointers(const MgvqMatrix& weight, const void* x, MgvqType x_type, const void* y, MgvqType y_type,
                           const void* bias, MgvqType bias_type) {
  const auto off = [](const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes != 0; };
  const auto floating = [](MgvqType type) { return type == kMgvqFloat16 || type == kMgvqFloat32; };
  if (!floating(x_type) || !floating(y_type) || (bias && !floating(bias_type)))
    return "x, y and bias must be fp16 or fp32";
  if (!x || !y) return "x or y is null";
  if (off(x, x_type == kMgvqFloat16 ? 2 : 4) || off(y, y_type == kMgvqFloat16 ? 2 : 4) ||
      off(bias, bias_type == kMgvqFloat16 ? 2 : 4))
    return "x, y or bias is not aligned to its element";
  return weight_pointers_refusal(weight);
}

struct Call {
  Problem problem;
  Device device;
  Tactic tactic;
  const MgvqMatrix* weight;
  Activation x;
  Output y;
  float* token_scales;
  float* partial;
  int64_t tokens;
};

Activation slice(const Activation& x, int64_t first, int64_t columns) {
  const int size = x.is_float ? 4 : 2;
  Activation part = x;
  part.data = static_cast<const char*>(x.data) + first * size;
  part.columns = columns;
  part.pairs_aligned = reinterpret_cast<uintptr_t>(part.data) % (2 * size) == 0 && x.stride % 2 == 0;
  return part;
}

SegmentLaunch segment_launch(const Call& call, int index, int64_t first_column, int first_slot) {
  const MgvqSegment& segment = call.weight->segments[index];
  SegmentLaunch out{};
  out.codes = static_cast<const unsigned char*>(segment.codes);
  out.table = segment.table;
  out.scales = static_cast<const uint16_t*>(segment.scales);
  out.x = slice(call.x, first_column, segment.columns);
  out.y = call.y;
  out.token_scales = call.token_scales;
  out.rows = call.weight->rows;
  out.column_blocks = static_cast<int>(padded(segment.columns, kColumnGroup) / kColumnGroup);
  out.parts = parts_of(call.problem, index, call.tactic);
  out.first_slot = first_slot;
  out.partial = call.partial;
  return out;
}

cudaError_t run(const Call& call, cudaStream_t stream) {
  const bool int8 = call.tactic.activations == Activations::kInt8, skinny = call.tactic.regime == Regime::kSkinny;
  if (int8) {
    const cudaError_t error = launch(token_scales_kernel, static_cast<unsigned>(call.tokens), 1, kScaleThreads,
                                     4 * kScaleThreads, stream, call.x, call.token_scales);
    if (error != cudaSuccess) return error;
  }
  int64_t column = 0;
  int slots = 0;
  for (int i = 0; i < call.weight->segment_count; ++i) {
    SegmentLaunch segment = segment_launch(call, i, column, slots);
    const CodeLaunchers* launchers = launchers_of(call.problem.segments[i].code);
    cudaError_t error;
    if (skinny) {
      const int64_t items = padded(segment.rows, kRowGroup) / kRowGroup * segment.parts;
      const int64_t most = blocks_at_once(call.device);
      error = launchers->skinny(segment, int8, static_cast<unsigned>(items < most ? items : most), stream);
    } else {
      segment.adds = i > 0;
      if (i + 1 < call.weight->segment_count) segment.y.bias = nullptr;
      error = launchers->tiled(segment, int8, stream);
    }
    if (error != cudaSuccess) return error;
    column += segment.x.columns;
    slots += segment.parts;
  }
  if (!call.partial) return cudaSuccess;
  return launch(reduce_kernel, static_cast<unsigned>((call.weight->rows + 255) / 256), static_cast<unsigned>(call.tokens),
                256, 0, stream, static_cast<const float*>(call.partial), slots, call.y, call.weight->rows, call.tokens);
}

}  // namespace
}  // namespace mgvq

int32_t mgvq_abi() { return kMgvqAbi; }

const char* mgvq_architectures() {
#if defined(MGVQ_ARCHITECTURES)
  return MGVQ_ARCHITECTURES;
#elif defined(MGVQ_EMULATE)
  return "87";
#else
  return "";
#endif
}

const char* mgvq_reason() { return mgvq::reason_text; }

int64_t mgvq_linear_workspace(const MgvqMatrix* weight, int64_t tokens, int32_t tactic_id) {
  using namespace mgvq;
  reason_text[0] = 0;
  Problem problem;
  Device device;
  Tactic tactic;
  if (tokens == 0) return 0;
  if (const char* reason = resolve(weight, tokens, tactic_id, &problem, &device, &tactic)) {
    refuse(reason);
    return -1;
  }
  return static_cast<int64_t>(workspace_bytes(problem, device, tactic));
}

cudaError_t mgvq_linear(const MgvqMatrix* weight, const void* x, MgvqType x_type, int64_t x_stride, void* y,
                        MgvqType y_type, int64_t y_stride, const void* bias, MgvqType bias_type, int64_t tokens,
                        int32_t tactic_id, void* workspace, int64_t workspace_size, cudaStream_t stream) {
  using namespace mgvq;
  reason_text[0] = 0;
  if (tokens == 0) return cudaSuccess;
  Call call{};
  if (const char* reason = resolve(weight, tokens, tactic_id, &call.problem, &call.device, &call.tactic))
    return refuse(reason);
  if (const char* reason = check_pointers(*weight, x, x_type, y, y_type, bias, bias_type)) return refuse(reason);
  const int64_t columns = call.problem.columns();
  if (x_stride < columns || y_stride < weight->rows) return refuse("a row stride is smaller than the row");
  const std::size_t needed = workspace_bytes(call.problem, call.device, call.tactic);
  if (needed && (!workspace || workspace_size < static_cast<int64_t>(needed) ||
                 reinterpret_cast<uintptr_t>(workspace) % 16 != 0))
    return refuse("the workspace is null, not on 16 bytes, or smaller than mgvq_linear_workspace says");
  call.weight = weight;
  call.tokens = tokens;
  call.x = slice({x, x_stride, columns, static_cast<int>(tokens), x_type == kMgvqFloat32, false}, 0, columns);
  call.y = {y, y_stride, y_type == kMgvqFloat32, bias, bias_type == kMgvqFloat32};
  const std::size_t scales = scale_bytes(call.problem, call.tactic);
  if (scales) call.token_scales = static_cast<float*>(workspace);
  if (needed > scales) call.partial = reinterpret_cast<float*>(static_cast<char*>(workspace) + scales);
  return run(call, stream);
}
