// Kernels that decode weight by weight, straight from the format's definition: dequantize (the oracle of the others) and
// embedding; and the read that measures the memory's roof.
#include "vq_linear/kernels.h"
#include "vq_linear/activations.cuh"
#include "vq_linear/layout.h"
#include "vq_linear/reason.h"

namespace mgvq {
namespace {

constexpr int kThreads = 256;

// Where one segment of a weight lies.
struct Stored {
  const unsigned char* codes;
  const void* table;
  const uint16_t* scales;
  Code code;
  int64_t rows, columns, first_column;
};

Stored stored_segment(const MgvqMatrix& weight, int index, int64_t first_column) {
  const MgvqSegment& segment = weight.segments[index];
  return {static_cast<const unsigned char*>(segment.codes), segment.table,
          static_cast<const uint16_t*>(segment.scales), {segment.vector, segment.shift, segment.window},
          weight.rows, segment.columns, first_column};
}

// The window of a place as an index into the table: L bits from bit k·t of the chunk, wrapping. L ≤ 9, so two bytes do.
MGVQ_DEVICE uint32_t window_at(const Stored& w, const Place& place) {
  const int bit = w.code.shift * place.window, first = bit / 8, chunk = place.chunk * w.code.chunk_bytes();
  const unsigned char* unit = w.codes + place.unit * w.code.unit_bytes();
  const uint32_t high = unit[byte_in_unit(w.code, place.lane, chunk + first)];
  const uint32_t low = unit[byte_in_unit(w.code, place.lane, chunk + (first + 1) % w.code.chunk_bytes())];
  return (high << 8 | low) >> (16 - w.code.window - bit % 8) & (w.code.entries() - 1);
}

MGVQ_DEVICE float weight_at(const Stored& w, int64_t row, int64_t column) {
  const Place place = place_of(w.code, row, column, w.columns);
  const uint32_t entry = window_at(w, place) * w.code.vector + place.value;
  const float value = w.code.vector == 4 ? static_cast<float>(static_cast<const int8_t*>(w.table)[entry])
                                         : float_of_half(static_cast<const uint16_t*>(w.table)[entry]);
  return value * float_of_half(w.scales[row]);
}

MGVQ_KERNEL(kThreads, 1) dequantize_kernel(Stored w, uint16_t* out, int64_t stride) {
  const int64_t row = MGVQ_BLOCK;
  for (int64_t column = MGVQ_THREAD; column < w.columns; column += MGVQ_THREADS)
    out[row * stride + w.first_column + column] = half_of_float(weight_at(w, row, column));
}

MGVQ_KERNEL(kThreads, 1) embedding_kernel(Stored w, const void* ids, bool ids_are_long, Output out) {
  const int64_t place = MGVQ_BLOCK;
  const int64_t id = ids_are_long ? static_cast<const int64_t*>(ids)[place] : static_cast<const int32_t*>(ids)[place];
  const bool inside = id >= 0 && id < w.rows;
  for (int64_t column = MGVQ_THREAD; column < w.columns; column += MGVQ_THREADS)
    store(out, place, w.first_column + column, inside ? weight_at(w, id, column) : 0.0f);
}

// Folded so that no load can be left out; the last writer of sink wins. Four loads of a thread are under way at once:
// with one, 2,048 threads hold 32 KiB in flight, about what a multiprocessor of an H200 needs and no more
// (vq-kernels.md 3.1).
MGVQ_KERNEL(512, 1) read_kernel(const unsigned char* data, int64_t quads, uint32_t* sink) {
  constexpr int kAtOnce = 4;
  uint32_t sum = 0;
  const int64_t step = int64_t{MGVQ_BLOCKS} * MGVQ_THREADS;
  for (int64_t i = int64_t{MGVQ_BLOCK} * MGVQ_THREADS + MGVQ_THREAD; i < quads; i += kAtOnce * step) {
    uint32_t words[kAtOnce][4] = {};
    MGVQ_UNROLL for (int n = 0; n < kAtOnce; ++n)
      if (i + n * step < quads) load_stream(data + 16 * (i + n * step), words[n]);
    MGVQ_UNROLL for (int n = 0; n < kAtOnce; ++n) sum ^= words[n][0] ^ words[n][1] ^ words[n][2] ^ words[n][3];
  }
  if (sum == 0x9e3779b9u) *sink = sum;
}

const char* check_weight(const MgvqMatrix* weight) {
  Problem problem;
  if (const char* reason = problem_of(weight, 1, &problem)) return reason;
  return weight_pointers_refusal(*weight);
}

int64_t columns_of(const MgvqMatrix& weight) {
  int64_t sum = 0;
  for (int i = 0; i < weight.segment_count; ++i) sum += weight.segments[i].columns;
  return sum;
}

constexpr int64_t kMostBlocks = 0x7fffffff;

}  // namespace
}  // namespace mgvq

cudaError_t mgvq_dequantize(const MgvqMatrix* weight, void* out, int64_t out_stride, cudaStream_t stream) {
  using namespace mgvq;
  reason_text[0] = 0;
  if (const char* reason = check_weight(weight)) return refuse(reason);
  if (!out || reinterpret_cast<uintptr_t>(out) % 2) return refuse("out is null or not aligned to 2 bytes");
  if (out_stride < columns_of(*weight)) return refuse("out's row stride is smaller than the row");
  int64_t column = 0;
  for (int i = 0; i < weight->segment_count; ++i) {
    const cudaError_t error = launch(dequantize_kernel, static_cast<unsigned>(weight->rows), 1, kThreads, 0, stream,
                                     stored_segment(*weight, i, column), static_cast<uint16_t*>(out), out_stride);
    if (error != cudaSuccess) return error;
    column += weight->segments[i].columns;
  }
  return cudaSuccess;
}

cudaError_t mgvq_embedding(const MgvqMatrix* weight, const void* ids, MgvqType ids_type, int64_t count, void* out,
                           MgvqType out_type, cudaStream_t stream) {
  using namespace mgvq;
  reason_text[0] = 0;
  if (const char* reason = check_weight(weight)) return refuse(reason);
  if (ids_type != kMgvqInt32 && ids_type != kMgvqInt64) return refuse("ids must be int32 or int64");
  if (!is_floating(out_type)) return refuse("out must be fp16, fp32 or bf16");
  if (count < 0 || count > kMostBlocks) return refuse("count must lie in 0..2^31 - 1");
  if (count == 0) return cudaSuccess;
  if (!ids || reinterpret_cast<uintptr_t>(ids) % (ids_type == kMgvqInt64 ? 8 : 4))
    return refuse("ids are null or not aligned to their element");
  if (!out || reinterpret_cast<uintptr_t>(out) % static_cast<unsigned>(size_of(out_type)))
    return refuse("out is null or not aligned to its element");
  const Output target{out, columns_of(*weight), out_type, false, nullptr, kMgvqFloat16};
  int64_t column = 0;
  for (int i = 0; i < weight->segment_count; ++i) {
    const cudaError_t error = launch(embedding_kernel, static_cast<unsigned>(count), 1, kThreads, 0, stream,
                                     stored_segment(*weight, i, column), ids, ids_type == kMgvqInt64, target);
    if (error != cudaSuccess) return error;
    column += weight->segments[i].columns;
  }
  return cudaSuccess;
}

cudaError_t mgvq_read(const void* data, int64_t bytes, uint32_t* sink, cudaStream_t stream) {
  using namespace mgvq;
  reason_text[0] = 0;
  if (!data || !sink || reinterpret_cast<uintptr_t>(data) % 16 || bytes < 16 || bytes % 16)
    return refuse("data must be aligned to 16 bytes and a positive multiple of 16 bytes; sink must not be null");
  Device device;
  if (!current_device(&device)) return refuse("there is no CUDA device, or its attributes cannot be read");
  return launch(read_kernel, static_cast<unsigned>(4 * device.multiprocessors), 1, 512, 0, stream,
                static_cast<const unsigned char*>(data), bytes / 16, sink);
}
