// Why a call was refused: the text behind mgvq_reason(), and what more than one launcher checks or asks.
#pragma once

#include <cstdio>

#include "vq_linear/dispatch.h"
#include "vq_linear/kernels.h"

namespace mgvq {

extern thread_local char reason_text[256];

inline cudaError_t refuse(const char* reason) {
  std::snprintf(reason_text, sizeof reason_text, "%s", reason);
  return cudaErrorInvalidValue;
}

// What the dispatcher wants to know of the current device; false where there is none. The driver is asked once a device:
// a launch of a few microseconds must not wait for it.
bool current_device(Device* out);

inline bool is_floating(MgvqType type) {
  return type == kMgvqFloat16 || type == kMgvqFloat32 || type == kMgvqBfloat16;
}

// The problem of a weight and a number of tokens; nullptr, or why it has none.
inline const char* problem_of(const MgvqMatrix* weight, int64_t tokens, Problem* problem) {
  if (!weight || !weight->segments) return "the weight or its segments are null";
  if (weight->segment_count < 1 || weight->segment_count > kMaxSegments) return "a weight has 1 to 3 segments";
  *problem = Problem{};
  problem->tokens = tokens;
  problem->rows = weight->rows;
  problem->segment_count = weight->segment_count;
  for (int i = 0; i < weight->segment_count; ++i) {
    const MgvqSegment& segment = weight->segments[i];
    problem->segments[i].code = {segment.vector, segment.shift, segment.window};
    problem->segments[i].columns = segment.columns;
  }
  return refusal(*problem, 0);
}

inline const char* weight_pointers_refusal(const MgvqMatrix& weight) {
  const auto off = [](const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes != 0; };
  for (int i = 0; i < weight.segment_count; ++i) {
    const MgvqSegment& segment = weight.segments[i];
    if (!segment.codes || !segment.table || !segment.scales) return "codes, table or scales of a segment are null";
    if (off(segment.codes, 16)) return "codes are not aligned to 16 bytes";
    if (off(segment.table, 16)) return "a table is not aligned to 16 bytes";
    if (off(segment.scales, 2)) return "scales are not aligned to 2 bytes";
  }
  return nullptr;
}

}  // namespace mgvq
