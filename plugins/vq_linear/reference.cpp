#include "vq_linear/reference.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

namespace {

using mgvq::Code;

constexpr float kLargestHalf = 65504.0f;

thread_local char reason[256] = "";

template <typename... Values>
int refuse(const char* format, Values... values) {
  std::snprintf(reason, sizeof(reason), format, values...);
  return 1;
}

Code code_of(const MgvqReferenceSegment& segment) { return {segment.vector, segment.shift, segment.window}; }

int check(const MgvqReferenceMatrix* weight) {
  reason[0] = '\0';
  if (weight == nullptr || weight->segments == nullptr) return refuse("expected a matrix with segments, found null");
  const long long rows = weight->rows;
  if (rows < 1) return refuse("expected at least 1 row, found %lld", rows);
  if (weight->segment_count < 1 || weight->segment_count > mgvq::kMaxSegments)
    return refuse("expected 1 to %d segments, found %d", mgvq::kMaxSegments, weight->segment_count);
  for (int i = 0; i < weight->segment_count; ++i) {
    const MgvqReferenceSegment& segment = weight->segments[i];
    const long long columns = segment.columns;
    if (!mgvq::is_known(code_of(segment)))
      return refuse("segment %d: code (%d,%d,%d) has no kernels", i, segment.vector, segment.shift, segment.window);
    if (columns < 1) return refuse("segment %d: expected at least 1 column, found %lld", i, columns);
    if (i + 1 < weight->segment_count && columns % mgvq::kSegmentColumns)
      return refuse("segment %d: expected a multiple of %d columns, found %lld", i, mgvq::kSegmentColumns, columns);
    if (segment.codes == nullptr || segment.table == nullptr || segment.scales == nullptr)
      return refuse("segment %d: codes, table and scales must not be null", i);
  }
  return 0;
}

int64_t columns_of(const MgvqReferenceMatrix& weight) {
  int64_t sum = 0;
  for (int i = 0; i < weight.segment_count; ++i) sum += weight.segments[i].columns;
  return sum;
}

// Bit number `bit` of a chunk's stream, most significant bit of byte 0 first; `chunk` points at the whole unit.
int stream_bit(const Code& code, const uint8_t* unit, int lane, int chunk, int bit) {
  const int byte = chunk * code.chunk_bytes() + bit / 8;
  return unit[mgvq::byte_in_unit(code, lane, byte)] >> (7 - bit % 8) & 1;
}

// The table entry's value for one weight, before its scale.
float entry_of(const MgvqReferenceSegment& segment, int64_t row, int64_t column) {
  const Code code = code_of(segment);
  const mgvq::Place place = mgvq::place_of(code, row, column, segment.columns);
  const uint8_t* unit = segment.codes + place.unit * code.unit_bytes();
  const int bits = 8 * code.chunk_bytes();
  int window = 0;
  for (int i = 0; i < code.window; ++i)
    window = window << 1 | stream_bit(code, unit, place.lane, place.chunk, (code.shift * place.window + i) % bits);
  const int value = window * code.vector + place.value;
  if (code.vector == 4) return static_cast<const int8_t*>(segment.table)[value];
  uint16_t half;
  std::memcpy(&half, static_cast<const uint8_t*>(segment.table) + 2 * value, sizeof(half));
  return mgvq_reference_float_from_half(half);
}

float scale_of(const MgvqReferenceSegment& segment, int64_t row) {
  return mgvq_reference_float_from_half(segment.scales[row]);
}

// Ŵ[row, :] into out[columns].
void decode_row(const MgvqReferenceMatrix& weight, int64_t row, float* out) {
  for (int i = 0; i < weight.segment_count; ++i) {
    const MgvqReferenceSegment& segment = weight.segments[i];
    for (int64_t column = 0; column < segment.columns; ++column)
      *out++ = scale_of(segment, row) * entry_of(segment, row, column);
  }
}

}  // namespace

const char* mgvq_reference_reason() { return reason; }

float mgvq_reference_float_from_half(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const float sign = half >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? std::nanf("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}

uint16_t mgvq_reference_half_from_float(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (magnitude >= 65520.0) return sign | 0x7c00;  // half way to 65536, which would be the next number
  // The spacing of fp16 around the value: 2^-24 below the normal numbers, else 2^(exponent - 10).
  int exponent = -14;
  if (magnitude >= std::ldexp(1.0, -14)) exponent = std::ilogb(magnitude);
  const double steps = std::nearbyint(std::ldexp(magnitude, 10 - exponent));  // ties to even; 0..2048
  // Biased exponent and fraction are one number: a carry out of the fraction raises the exponent, as it should.
  const int bits = static_cast<int>(steps) + (exponent + 14) * 1024;
  return sign | static_cast<uint16_t>(bits);
}

void mgvq_reference_round_activations(const float* x, int64_t count, float* rounded) {
  for (int64_t i = 0; i < count; ++i) {
    const float clamped = x[i] > kLargestHalf ? kLargestHalf : x[i] < -kLargestHalf ? -kLargestHalf : x[i];
    rounded[i] = mgvq_reference_float_from_half(mgvq_reference_half_from_float(clamped));
  }
}

int mgvq_reference_decode(const MgvqReferenceMatrix* weight, float* out) {
  if (check(weight)) return 1;
  const int64_t columns = columns_of(*weight);
  for (int64_t row = 0; row < weight->rows; ++row) decode_row(*weight, row, out + row * columns);
  return 0;
}

int mgvq_reference_linear(const MgvqReferenceMatrix* weight, const float* x, const float* bias, int64_t tokens,
                          double* y, double* magnitude) {
  if (check(weight)) return 1;
  const int64_t columns = columns_of(*weight);
  std::vector<float> row_weights(columns);
  for (int64_t row = 0; row < weight->rows; ++row) {
    decode_row(*weight, row, row_weights.data());
    for (int64_t token = 0; token < tokens; ++token) {
      double sum = 0.0, absolute = 0.0;
      for (int64_t column = 0; column < columns; ++column) {
        const double product = static_cast<double>(row_weights[column]) * x[token * columns + column];
        sum += product;
        absolute += std::fabs(product);
      }
      y[token * weight->rows + row] = sum + (bias ? bias[row] : 0.0f);
      if (magnitude) magnitude[token * weight->rows + row] = absolute;
    }
  }
  return 0;
}

int mgvq_reference_linear_float(const MgvqReferenceMatrix* weight, const float* x, const float* bias, int64_t tokens,
                                float* y) {
  if (check(weight)) return 1;
  const int64_t columns = columns_of(*weight);
  std::vector<float> entries(columns);
  for (int64_t row = 0; row < weight->rows; ++row) {
    float* next = entries.data();
    for (int i = 0; i < weight->segment_count; ++i)
      for (int64_t column = 0; column < weight->segments[i].columns; ++column)
        *next++ = entry_of(weight->segments[i], row, column);
    for (int64_t token = 0; token < tokens; ++token) {
      float total = 0.0f;
      int64_t column = 0;
      for (int i = 0; i < weight->segment_count; ++i) {
        float sum = 0.0f;
        for (const int64_t end = column + weight->segments[i].columns; column < end; ++column)
          sum += entries[column] * x[token * columns + column];
        total += sum * scale_of(weight->segments[i], row);
      }
      y[token * weight->rows + row] = bias ? total + bias[row] : total;
    }
  }
  return 0;
}

int mgvq_reference_embedding(const MgvqReferenceMatrix* weight, const int64_t* ids, int64_t count, float* out) {
  if (check(weight)) return 1;
  const int64_t columns = columns_of(*weight);
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] >= 0 && ids[i] < weight->rows)
      decode_row(*weight, ids[i], out + i * columns);
    else
      std::memset(out + i * columns, 0, sizeof(float) * columns);
  }
  return 0;
}
