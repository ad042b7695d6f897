#include "vq_linear/rows.h"

namespace mgvq {

namespace {

constexpr int kThreads = 512;
constexpr int kPiece = 8;  // elements a thread takes at once: 16 bytes of fp16
constexpr int kTargetExponent = 14, kLowestExponent = -100, kBias = 127, kFractionBits = 23;
constexpr uint32_t kMagnitudeBits = 0x7fffffffu, kExponentBits = 0x7f800000u;

// The largest of all threads' words, to all of them. Magnitudes of floats are in order as integers, with infinity above
// every number and NaN above infinity, so that no NaN is lost.
MGVQ_DEVICE uint32_t block_largest(uint32_t mine) {
  put_shared(4 * MGVQ_THREAD, mine);
  sync_threads();
  for (uint32_t reach = kThreads / 2; reach > 0; reach /= 2) {
    if (MGVQ_THREAD < reach) {
      const uint32_t other = shared_word(4 * (MGVQ_THREAD + reach));
      if (other > mine) mine = other;
      put_shared(4 * MGVQ_THREAD, mine);
    }
    sync_threads();
  }
  return shared_word(0);
}

MGVQ_DEVICE uint32_t larger_magnitude(uint32_t largest, float value) {
  const uint32_t magnitude = bits_of_float(value) & kMagnitudeBits;
  return magnitude > largest ? magnitude : largest;
}

// max |x[token, :]| / 127, to all threads.
MGVQ_DEVICE float int8_scale(const Activation& x, int64_t token) {
  uint32_t largest = 0;
  for (int64_t column = 2 * MGVQ_THREAD; column < x.columns; column += 2 * kThreads) {
    const uint32_t pair = activation_pair(x, token, column);
    largest = larger_magnitude(largest, float_of_half(static_cast<uint16_t>(pair)));
    largest = larger_magnitude(largest, float_of_half(static_cast<uint16_t>(pair >> 16)));
  }
  return float_from_bits(block_largest(largest)) / 127.0f;
}

MGVQ_KERNEL(kThreads, 1) int8_scales_kernel(Activation x, float* scales) {
  const float scale = int8_scale(x, MGVQ_BLOCK);
  if (MGVQ_THREAD == 0) scales[MGVQ_BLOCK] = scale;
}

MGVQ_KERNEL(kThreads, 1) int8_rows_kernel(Activation x, int8_t* bytes, int64_t stride, float* factors,
                                          bool has_factors) {
  const int64_t token = MGVQ_BLOCK;
  const float scale = int8_scale(x, token), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  if (MGVQ_THREAD == 0) factors[token] = has_factors ? scale * factors[token] : scale;
  for (int64_t column = 4 * MGVQ_THREAD; column < stride; column += 4 * kThreads) {
    const uint32_t quad = activation_quad(x, token, column, inverse);
    *reinterpret_cast<uint32_t*>(bytes + token * stride + column) = quad;
  }
}

// Rows of bf16 or fp32 in pieces of eight elements. `kVector`: every row begins on 16 bytes and holds whole pieces.
template <MgvqType kType, bool kVector>
struct Row {
  const void* data;
  int64_t first, columns;

  MGVQ_DEVICE void read(int64_t column, float (&out)[kPiece]) const {
    if constexpr (!kVector) {
      MGVQ_UNROLL for (int i = 0; i < kPiece; ++i)
        out[i] = column + i < columns ? value_at(data, kType, first + column + i) : 0.0f;
    } else if constexpr (kType == kMgvqBfloat16) {
      uint32_t words[4];
      load_stream(static_cast<const uint16_t*>(data) + first + column, words);
      MGVQ_UNROLL for (int i = 0; i < kPiece; ++i)
        out[i] = float_of_bfloat(static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2))));
    } else {
      uint32_t words[2][4];
      MGVQ_UNROLL for (int half = 0; half < 2; ++half)
        load_stream(static_cast<const float*>(data) + first + column + 4 * half, words[half]);
      MGVQ_UNROLL for (int i = 0; i < kPiece; ++i) out[i] = float_from_bits(words[i / 4][i % 4]);
    }
  }
};

template <MgvqType kType, bool kVector>
MGVQ_KERNEL(kThreads, 1) scaled_rows_kernel(const void* x, int64_t x_stride, int64_t columns, uint16_t* halves,
                                            int64_t halves_stride, float* factors) {
  const int64_t token = MGVQ_BLOCK;
  const Row<kType, kVector> row{x, token * x_stride, columns};
  uint32_t largest = 0;
  float values[kPiece];
  for (int64_t column = kPiece * MGVQ_THREAD; column < columns; column += kPiece * kThreads) {
    row.read(column, values);
    MGVQ_UNROLL for (int i = 0; i < kPiece; ++i) largest = larger_magnitude(largest, values[i]);
  }
  largest = block_largest(largest);
  // Integer arithmetic on the exponent's bits: both powers of two are normal float32 numbers.
  constexpr uint32_t kLowest = static_cast<uint32_t>(kBias + kLowestExponent) << kFractionBits;
  const uint32_t found = largest & kExponentBits, exponent = found > kLowest ? found : kLowest;
  const float down = float_from_bits((static_cast<uint32_t>(2 * kBias + kTargetExponent) << kFractionBits) - exponent);
  const float back = float_from_bits(exponent - (static_cast<uint32_t>(kTargetExponent) << kFractionBits));
  if (MGVQ_THREAD == 0) factors[token] = largest < kExponentBits ? back : float_from_bits(0x7fc00000u);
  for (int64_t column = kPiece * MGVQ_THREAD; column < columns; column += kPiece * kThreads) {
    row.read(column, values);
    uint32_t words[4];
    MGVQ_UNROLL for (int i = 0; i < 4; ++i) words[i] = pack_halves(values[2 * i] * down, values[2 * i + 1] * down);
    uint16_t* const to = halves + token * halves_stride + column;
    if (column + kPiece <= columns) {
      put_words(to, words);
    } else {
      for (int i = 0; column + i < columns; ++i) to[i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
    }
  }
}

template <MgvqType kType>
cudaError_t launch_rows_of(const void* x, int64_t x_stride, int64_t columns, int64_t tokens, void* halves,
                           int64_t halves_stride, float* factors, cudaStream_t stream) {
  const bool whole = reinterpret_cast<uintptr_t>(x) % 16 == 0 && x_stride * size_of(kType) % 16 == 0 &&
                     columns % kPiece == 0;
  const auto kernel = whole ? scaled_rows_kernel<kType, true> : scaled_rows_kernel<kType, false>;
  return launch(kernel, static_cast<unsigned>(tokens), 1, kThreads, 4 * kThreads, stream, x, x_stride, columns,
                static_cast<uint16_t*>(halves), halves_stride, factors);
}

}  // namespace

cudaError_t launch_int8_scales(const Activation& x, float* scales, cudaStream_t stream) {
  return launch(int8_scales_kernel, static_cast<unsigned>(x.tokens), 1, kThreads, 4 * kThreads, stream, x, scales);
}

cudaError_t launch_int8_rows(const Activation& x, int8_t* bytes, int64_t stride, float* factors, bool has_factors,
                             cudaStream_t stream) {
  return launch(int8_rows_kernel, static_cast<unsigned>(x.tokens), 1, kThreads, 4 * kThreads, stream, x, bytes, stride,
                factors, has_factors);
}

cudaError_t launch_scaled_rows(const void* x, MgvqType type, int64_t x_stride, int64_t columns, int64_t tokens,
                               void* halves, int64_t halves_stride, float* factors, cudaStream_t stream) {
  if (type == kMgvqBfloat16)
    return launch_rows_of<kMgvqBfloat16>(x, x_stride, columns, tokens, halves, halves_stride, factors, stream);
  return launch_rows_of<kMgvqFloat32Scaled>(x, x_stride, columns, tokens, halves, halves_stride, factors, stream);
}

}  // namespace mgvq
