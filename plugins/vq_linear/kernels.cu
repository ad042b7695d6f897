// The launchers of kernels.h: arguments checked in words, then one kernel a segment and, where columns were split, one more
// that adds the parts up in a fixed order.
#include "vq_linear/kernels.h"

#include <atomic>
#include <mutex>

#include "vq_linear/dispatch.h"
#include "vq_linear/linear.h"
#include "vq_linear/reason.h"
#include "vq_linear/rows.h"

namespace mgvq {

thread_local char reason_text[256] = "";

bool current_device(Device* out) {
  struct Known {
    std::atomic<bool> is_known{false};
    Device device{};
  };
  constexpr int kMost = 64;
  static Known known[kMost];
  static std::mutex filling;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0) return false;
  const bool is_kept = device < kMost;
  if (is_kept && known[device].is_known.load(std::memory_order_acquire)) {
    *out = known[device].device;
    return true;
  }
  int major = 0, minor = 0;
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, device) == cudaSuccess;
  };
  if (!ask(&major, cudaDevAttrComputeCapabilityMajor) || !ask(&minor, cudaDevAttrComputeCapabilityMinor) ||
      !ask(&out->multiprocessors, cudaDevAttrMultiProcessorCount) ||
      !ask(&out->shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin))
    return false;  // not kept: the next call asks again
  out->sm = 10 * major + minor;
  const std::lock_guard<std::mutex> lock(filling);
  if (is_kept && !known[device].is_known.load(std::memory_order_relaxed)) {
    known[device].device = *out;
    known[device].is_known.store(true, std::memory_order_release);
  }
  return true;
}

namespace {

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

bool is_scaled(MgvqType x_type) { return x_type == kMgvqBfloat16 || x_type == kMgvqFloat32Scaled; }

const char* check_pointers(const MgvqMatrix& weight, const void* x, MgvqType x_type, const void* y, MgvqType y_type,
                           const void* bias, MgvqType bias_type) {
  const auto off = [](const void* pointer, MgvqType type) {
    return reinterpret_cast<uintptr_t>(pointer) % static_cast<unsigned>(size_of(type)) != 0;
  };
  if (!(is_floating(x_type) || is_scaled(x_type)) || !is_floating(y_type) || (bias && !is_floating(bias_type)))
    return "x, y and bias must be fp16, fp32 or bf16";
  if (!x || !y) return "x or y is null";
  if (off(x, x_type) || off(y, y_type) || (bias && off(bias, bias_type)))
    return "x, y or bias is not aligned to its element";
  return weight_pointers_refusal(weight);
}

// The workspace: [int8 scales and rows | sums of segments or splits] as dispatch.h has it, then [factors | halves] of
// scaled rows.
struct Workspace {
  std::size_t scales, all_of_dispatch, factors, halves;
  int64_t halves_stride;

  std::size_t bytes() const { return all_of_dispatch + factors + halves; }
};

Workspace workspace_of(const Problem& problem, const Device& device, const Tactic& tactic, MgvqType x_type) {
  Workspace out{scale_bytes(problem, tactic), workspace_bytes(problem, device, tactic), 0, 0, 0};
  if (!is_scaled(x_type)) return out;
  out.halves_stride = padded(problem.columns(), 8);
  out.factors = static_cast<std::size_t>(padded(4 * problem.tokens, 16));
  out.halves = static_cast<std::size_t>(2 * problem.tokens * out.halves_stride);
  return out;
}

struct Call {
  Problem problem;
  Device device;
  Tactic tactic;
  const MgvqMatrix* weight;
  Activation x;
  Output y;
  bool has_row_factors;  // token_factors hold what rows were divided by already
  float* token_scales;
  float* token_factors;
  int8_t* bytes;
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
  out.bytes = call.bytes ? call.bytes + first_column : nullptr;
  out.bytes_stride = int8_stride(call.problem);
  out.token_scales = call.token_scales;
  out.token_factors = call.token_factors;
  out.rows = call.weight->rows;
  out.column_blocks = static_cast<int>(padded(segment.columns, kColumnGroup) / kColumnGroup);
  out.parts = parts_of(call.problem, index, call.tactic);
  out.first_slot = first_slot;
  out.partial = call.partial;
  return out;
}

// The part of a launch from `row`, a multiple of 128, and `token` on.
SegmentLaunch cut(SegmentLaunch all, const Code& code, int64_t row, int64_t rows, int64_t token, int64_t tokens) {
  const auto behind = [](const void* data, int64_t bytes) {
    return data ? static_cast<const void*>(static_cast<const char*>(data) + bytes) : nullptr;
  };
  all.codes += row / kRowGroup * all.column_blocks * code.unit_bytes();
  all.scales += row;
  all.rows = rows;
  all.x.data = behind(all.x.data, token * all.x.stride * (all.x.is_float ? 4 : 2));
  all.x.tokens = static_cast<int>(tokens);
  all.y.data = static_cast<char*>(all.y.data) + (token * all.y.stride + row) * size_of(all.y.type);
  all.y.bias = behind(all.y.bias, row * size_of(all.y.bias_type));
  if (all.token_scales) all.token_scales += token;
  if (all.token_factors) all.token_factors += token;
  return all;
}

cudaError_t run_skinny(const Call& call, bool int8, cudaStream_t stream) {
  int64_t column = 0;
  int slots = 0;
  for (int i = 0; i < call.weight->segment_count; ++i) {
    const SegmentLaunch segment = segment_launch(call, i, column, slots);
    const int64_t items = padded(segment.rows, kRowGroup) / kRowGroup * segment.parts;
    const int64_t most = blocks_at_once(call.device);
    const cudaError_t error = launchers_of(call.problem.segments[i].code)
                                  ->skinny(segment, int8, static_cast<unsigned>(items < most ? items : most), stream);
    if (error != cudaSuccess) return error;
    column += segment.x.columns;
    slots += segment.parts;
  }
  if (!call.partial) return cudaSuccess;
  return launch(reduce_kernel, static_cast<unsigned>((call.weight->rows + 255) / 256), static_cast<unsigned>(call.tokens),
                256, 0, stream, static_cast<const float*>(call.partial), slots, call.y, call.weight->rows, call.tokens);
}

// One panel, segment after segment: each adds to what those before left in workspace, the last one rounds.
cudaError_t run_panel(const Call& call, bool int8, int64_t row, int64_t rows, int64_t token, int64_t tokens,
                      cudaStream_t stream) {
  int64_t column = 0;
  for (int i = 0; i < call.weight->segment_count; ++i) {
    const Code& code = call.problem.segments[i].code;
    SegmentLaunch segment = cut(segment_launch(call, i, column, 0), code, row, rows, token, tokens);
    segment.before = i > 0 ? call.partial : nullptr;
    if (i + 1 == call.weight->segment_count) segment.partial = nullptr;
    const cudaError_t error = launchers_of(code)->tiled(segment, int8, stream);
    if (error != cudaSuccess) return error;
    column += segment.x.columns;
  }
  return cudaSuccess;
}

cudaError_t run_tiled(const Call& call, bool int8, cudaStream_t stream) {
  const Panel panel = panel_of(call.problem, call.tactic);
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  for (int64_t row = 0; row < call.weight->rows; row += panel.rows)
    for (int64_t token = 0; token < call.tokens; token += panel.tokens) {
      const cudaError_t error = run_panel(call, int8, row, least(panel.rows, call.weight->rows - row), token,
                                          least(panel.tokens, call.tokens - token), stream);
      if (error != cudaSuccess) return error;
    }
  return cudaSuccess;
}

cudaError_t run(const Call& call, cudaStream_t stream) {
  if (call.tactic.activations == Activations::kFloat16)
    return call.tactic.regime == Regime::kSkinny ? run_skinny(call, false, stream) : run_tiled(call, false, stream);
  if (call.tactic.regime == Regime::kTiled) {
    const cudaError_t error = launch_int8_scales(call.x, call.token_scales, stream);
    return error == cudaSuccess ? run_tiled(call, true, stream) : error;
  }
  const cudaError_t error = launch_int8_rows(call.x, call.bytes, int8_stride(call.problem), call.token_factors,
                                             call.has_row_factors, stream);
  return error == cudaSuccess ? run_skinny(call, true, stream) : error;
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

int64_t mgvq_linear_workspace(const MgvqMatrix* weight, MgvqType x_type, int64_t tokens, int32_t tactic_id) {
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
  return static_cast<int64_t>(workspace_of(problem, device, tactic, x_type).bytes());
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
  const Workspace room = workspace_of(call.problem, call.device, call.tactic, x_type);
  if (room.bytes() && (!workspace || workspace_size < static_cast<int64_t>(room.bytes()) ||
                       reinterpret_cast<uintptr_t>(workspace) % 16 != 0))
    return refuse("the workspace is null, not on 16 bytes, or smaller than mgvq_linear_workspace says");
  call.weight = weight;
  call.tokens = tokens;
  call.y = {y, y_stride, y_type, quads_are_aligned(y, y_type, y_stride), bias, bias_type};
  char* const place = static_cast<char*>(workspace);
  call.has_row_factors = room.factors != 0;
  if (room.factors) call.token_factors = reinterpret_cast<float*>(place + room.all_of_dispatch);
  if (room.scales && call.tactic.regime == Regime::kTiled) {
    call.token_scales = reinterpret_cast<float*>(place);
  } else if (room.scales) {
    if (!room.factors) call.token_factors = reinterpret_cast<float*>(place);
    call.bytes = reinterpret_cast<int8_t*>(place + padded(4 * tokens, 16));
  }
  if (room.all_of_dispatch > room.scales) call.partial = reinterpret_cast<float*>(place + room.scales);
  Activation given{x, x_stride, columns, static_cast<int>(tokens), x_type == kMgvqFloat32, false};
  if (room.factors) {
    char* const halves = place + room.all_of_dispatch + room.factors;
    const cudaError_t error = launch_scaled_rows(x, x_type, x_stride, columns, tokens, halves, room.halves_stride,
                                                 call.token_factors, stream);
    if (error != cudaSuccess) return error;
    given.data = halves;
    given.stride = room.halves_stride;
  }
  call.x = slice(given, 0, columns);
  return run(call, stream);
}
