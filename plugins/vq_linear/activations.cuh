// Activations on their way to B fragments: fp16 or fp32 in, zero beyond the last column and token; and results on their
// way out.
#pragma once

#include "vq_linear/device.cuh"
#include "vq_linear/kernels.h"

namespace mgvq {

// x [tokens, columns] of one segment: `data` points at its first column.
struct Activation {
  const void* data;
  int64_t stride;     // elements from token to token
  int64_t columns;    // of this segment
  int tokens;
  bool is_float;      // fp32, else fp16
  bool pairs_aligned; // every even column of every token lies on two elements' alignment
};

MGVQ_DEVICE uint16_t half_from_activation(const Activation& x, int64_t place) {
  if (!x.is_float) return static_cast<const uint16_t*>(x.data)[place];
  return half_of_float(clamped(static_cast<const float*>(x.data)[place], kLargestHalf));
}

// Whether pairs can be read as they are: fp16, aligned, and no pair half beyond the last column.
inline bool is_plain(const Activation& x) { return !x.is_float && x.pairs_aligned && x.columns % 2 == 0; }

// Columns `column` and `column + 1` of a token as two halves; column is even. `kPlain` only for what is_plain says.
template <bool kPlain = false>
MGVQ_DEVICE uint32_t activation_pair(const Activation& x, int64_t token, int64_t column) {
  if (token >= x.tokens || column >= x.columns) return 0;
  if constexpr (kPlain)
    return *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(x.data) + token * x.stride + column);
  const int64_t place = token * x.stride + column;
  if (x.pairs_aligned && column + 1 < x.columns) {
    if (!x.is_float) return *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(x.data) + place);
    const float* pair = static_cast<const float*>(x.data) + place;
    return pack_halves(clamped(pair[0], kLargestHalf), clamped(pair[1], kLargestHalf));
  }
  const uint32_t low = half_from_activation(x, place);
  return column + 1 < x.columns ? low | static_cast<uint32_t>(half_from_activation(x, place + 1)) << 16 : low;
}

// Four columns as int8: round(half(x) · 127 / largest), ties to even; column is a multiple of 4.
MGVQ_DEVICE uint32_t activation_quad(const Activation& x, int64_t token, int64_t column, float inverse) {
  uint32_t out = 0;
  MGVQ_UNROLL for (int pair = 0; pair < 2; ++pair) {
    const uint32_t halves = activation_pair(x, token, column + 2 * pair);
    MGVQ_UNROLL for (int i = 0; i < 2; ++i) {
      const float value = float_of_half(static_cast<uint16_t>(halves >> (16 * i))) * inverse;
      out |= static_cast<uint32_t>(round_to_int(clamped(value, 127.0f)) & 0xff) << (8 * (2 * pair + i));
    }
  }
  return out;
}

// Element `place` of an array of a floating type, as float32.
MGVQ_DEVICE float value_at(const void* data, MgvqType type, int64_t place) {
  if (type == kMgvqFloat16) return float_of_half(static_cast<const uint16_t*>(data)[place]);
  if (type == kMgvqBfloat16) return float_of_bfloat(static_cast<const uint16_t*>(data)[place]);
  return static_cast<const float*>(data)[place];
}

// Where results go, rounded once.
struct Output {
  void* data;
  int64_t stride;      // elements from token to token
  MgvqType type;       // fp16, fp32 or bf16
  bool quads_aligned;  // every fourth row of every token lies on four elements' alignment
  const void* bias;    // [rows] or null
  MgvqType bias_type;
};

inline int size_of(MgvqType type) { return type == kMgvqFloat16 || type == kMgvqBfloat16 ? 2 : 4; }

inline bool quads_are_aligned(const void* data, MgvqType type, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % (4 * size_of(type)) == 0 && stride % 4 == 0;
}

MGVQ_DEVICE float bias_of(const Output& y, int64_t row) { return y.bias ? value_at(y.bias, y.bias_type, row) : 0.0f; }

MGVQ_DEVICE uint16_t short_of_float(MgvqType type, float value) {
  return type == kMgvqFloat16 ? half_of_float(value) : bfloat_of_float(value);
}

MGVQ_DEVICE void store(const Output& y, int64_t token, int64_t row, float value) {
  const int64_t place = token * y.stride + row;
  if (y.type == kMgvqFloat32)
    static_cast<float*>(y.data)[place] = value;
  else
    static_cast<uint16_t*>(y.data)[place] = short_of_float(y.type, value);
}

// The first `count` of four neighbouring rows; row is a multiple of 4.
MGVQ_DEVICE void store_quad(const Output& y, int64_t token, int64_t row, int count, const float (&values)[4]) {
  if (count < 4 || !y.quads_aligned) {
    MGVQ_UNROLL for (int i = 0; i < 4; ++i)
      if (i < count) store(y, token, row + i, values[i]);
    return;
  }
  const int64_t place = token * y.stride + row;
  if (y.type == kMgvqFloat32) {
    const uint32_t words[4] = {bits_of_float(values[0]), bits_of_float(values[1]), bits_of_float(values[2]),
                               bits_of_float(values[3])};
    put_words(static_cast<float*>(y.data) + place, words);
  } else {
    uint32_t words[2];
    MGVQ_UNROLL for (int i = 0; i < 2; ++i)
      words[i] = short_of_float(y.type, values[2 * i]) |
                 static_cast<uint32_t>(short_of_float(y.type, values[2 * i + 1])) << 16;
    put_words(static_cast<uint16_t*>(y.data) + place, words);
  }
}

}  // namespace mgvq
