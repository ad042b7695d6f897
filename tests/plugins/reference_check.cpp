// reference.cpp: fp16 by properties over all of its values, and decode, linear and embedding on cases worked by hand.
#include "vq_linear/reference.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"

namespace {

uint16_t half(float value) { return mgvq_reference_half_from_float(value); }
float full(uint16_t bits) { return mgvq_reference_float_from_half(bits); }

void halves_survive_the_way_to_float_and_back() {
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const float value = full(static_cast<uint16_t>(bits));
    if (std::isnan(value))
      EXPECT((bits & 0x7c00) == 0x7c00 && (bits & 0x3ff), "%04x", bits);
    else
      EXPECT(half(value) == bits, "%04x became %04x", bits, half(value));
  }
  EXPECT(full(0x3c00) == 1.0f && full(0xc000) == -2.0f && full(0x7bff) == 65504.0f, "by hand");
  EXPECT(full(0x0001) == std::ldexp(1.0f, -24) && full(0x03ff) == 1023 * std::ldexp(1.0f, -24), "subnormals by hand");
}

// Between neighbouring halves the midpoint goes to the even one, and the floats beside the midpoint to the nearer one.
void rounding_is_to_nearest_and_ties_go_to_even() {
  for (int bits = 0; bits < 0x7c00; ++bits) {
    const uint16_t low = static_cast<uint16_t>(bits), high = static_cast<uint16_t>(bits + 1);
    // Infinity rounds as the number after 65504 would.
    const double above = high == 0x7c00 ? 65536.0 : full(high);
    const float middle = static_cast<float>((full(low) + above) / 2);
    EXPECT(half(middle) == (bits % 2 ? high : low), "midpoint after %04x", bits);
    EXPECT(half(std::nextafter(middle, 0.0f)) == low, "below the midpoint after %04x", bits);
    EXPECT(half(std::nextafter(middle, INFINITY)) == high, "above the midpoint after %04x", bits);
    EXPECT(half(-middle) == ((bits % 2 ? high : low) | 0x8000), "minus the midpoint after %04x", bits);
  }
  EXPECT(half(INFINITY) == 0x7c00 && half(-1e30f) == 0xfc00 && half(NAN) == 0x7fff, "beyond the numbers");
  EXPECT(half(1e-30f) == 0 && half(-1e-30f) == 0x8000, "far below the numbers");
}

void activations_are_clamped_then_rounded() {
  const float x[] = {70000.0f, -1e30f, 2049.0f, 0.1f, -INFINITY};
  float rounded[5];
  mgvq_reference_round_activations(x, 5, rounded);
  EXPECT(rounded[0] == 65504.0f && rounded[1] == -65504.0f && rounded[4] == -65504.0f, "clamped");
  EXPECT(rounded[2] == 2048.0f, "2049 is half way between 2048 and 2050: %g", rounded[2]);
  EXPECT(rounded[3] == 1638.0f / 16384.0f, "nearest fp16 to 0.1: %g", rounded[3]);
}

// A matrix of one unit in code (2,4,8), all symbols 0 but two of them. Symbol t of a chunk is the leading half of window t
// and the trailing half of window t - 1.
struct ByHand {
  std::vector<uint8_t> codes = std::vector<uint8_t>(512, 0);
  std::vector<uint16_t> table = std::vector<uint16_t>(512, 0);
  std::vector<uint16_t> scales = std::vector<uint16_t>(128, 0);
  MgvqReferenceSegment segment;
  MgvqReferenceMatrix matrix;

  ByHand() {
    // Lane 4·3 + 1 owns rows 3, 11, 19, … and, in its first chunk, columns 2 and 3. Its stream is bytes 0-7 (chunk 0)
    // and 8-15 (chunk 1, columns 10 and 11), 16 bytes a lane: one plane.
    codes[(4 * 3 + 1) * 16 + 0] = 0x50;      // symbol 0 of chunk 0 is 5: window 0 is 0x50, window 15 is 0x05
    codes[(4 * 3 + 1) * 16 + 8 + 1] = 0x0a;  // symbol 3 of chunk 1 is 10: window 3 is 0xa0, window 2 is 0x0a
    set(0x50, 1.0f, 2.0f);
    set(0x05, 3.0f, 4.0f);
    set(0xa0, 5.0f, 6.0f);
    set(0x0a, 7.0f, 8.0f);
    for (int row = 0; row < 128; ++row) scales[row] = half(0.5f);
    segment = {codes.data(), table.data(), scales.data(), 16, 2, 4, 8, 0};
    matrix = {&segment, 128, 1, 0};
  }
  void set(int window, float first, float second) {
    table[2 * window] = half(first);
    table[2 * window + 1] = half(second);
  }
};

void decode_by_hand() {
  ByHand x;
  std::vector<float> out(128 * 16, -1.0f);
  EXPECT(mgvq_reference_decode(&x.matrix, out.data()) == 0, "%s", mgvq_reference_reason());
  std::vector<float> expected(128 * 16, 0.0f);
  expected[3 * 16 + 2] = 0.5f, expected[3 * 16 + 3] = 1.0f;                  // window 0 of chunk 0
  expected[(3 + 120) * 16 + 2] = 1.5f, expected[(3 + 120) * 16 + 3] = 2.0f;  // window 15, which wraps
  expected[(3 + 24) * 16 + 10] = 2.5f, expected[(3 + 24) * 16 + 11] = 3.0f;  // window 3 of chunk 1
  expected[(3 + 16) * 16 + 10] = 3.5f, expected[(3 + 16) * 16 + 11] = 4.0f;  // window 2
  EXPECT(out == expected, "the decoded unit");
}

void linears_by_hand() {
  ByHand x;
  std::vector<float> input(2 * 16, 0.0f), bias(128, 0.0f), single(2 * 128);
  input[2] = 3.0f, input[3] = -1.0f;             // token 0
  input[16 + 10] = 2.0f, input[16 + 11] = 1.0f;  // token 1
  bias[3] = 100.0f;
  std::vector<double> y(2 * 128), magnitude(2 * 128);
  EXPECT(mgvq_reference_linear(&x.matrix, input.data(), bias.data(), 2, y.data(), magnitude.data()) == 0, "linear");
  EXPECT(y[3] == 3 * 0.5 - 1.0 + 100 && magnitude[3] == 2.5, "token 0 row 3: %g, %g", y[3], magnitude[3]);
  EXPECT(y[123] == 3 * 1.5 - 2.0 && y[128 + 27] == 2 * 2.5 + 3.0 && y[128 + 19] == 2 * 3.5 + 4.0, "other rows");
  EXPECT(y[128 + 3] == 100.0 && y[0] == 0.0, "rows without weights");
  EXPECT(mgvq_reference_linear_float(&x.matrix, input.data(), bias.data(), 2, single.data()) == 0, "in float");
  for (int i = 0; i < 256; ++i) EXPECT(single[i] == y[i], "element %d: %g and %g", i, single[i], y[i]);
}

void embedding_by_hand() {
  ByHand x;
  const int64_t ids[] = {123, -1, 3, 128};
  std::vector<float> rows(4 * 16, -1.0f);
  EXPECT(mgvq_reference_embedding(&x.matrix, ids, 4, rows.data()) == 0, "embedding");
  EXPECT(rows[2] == 1.5f && rows[3] == 2.0f && rows[2 * 16 + 2] == 0.5f, "rows 123 and 3");
  for (int i = 0; i < 16; ++i) EXPECT(rows[16 + i] == 0.0f && rows[48 + i] == 0.0f, "ids outside give zeros");
}

void refusals_say_why() {
  std::vector<float> out(128 * 32);
  const auto expect = [&](const MgvqReferenceMatrix& matrix, const char* words) {
    EXPECT(mgvq_reference_decode(&matrix, out.data()) == 1, "%s", words);
    EXPECT(std::strstr(mgvq_reference_reason(), words), "found: %s", mgvq_reference_reason());
  };
  ByHand x;
  MgvqReferenceSegment two[] = {x.segment, x.segment};
  expect({two, 128, 2, 0}, "segment 0: expected a multiple of 64 columns, found 16");
  expect({two, 0, 1, 0}, "at least 1 row");
  expect({two, 128, 4, 0}, "1 to 3 segments, found 4");
  two[0].window = 9;
  expect({two, 128, 1, 0}, "code (2,4,9) has no kernels");
  two[0] = x.segment;
  two[0].scales = nullptr;
  expect({two, 128, 1, 0}, "must not be null");
  EXPECT(mgvq_reference_decode(&x.matrix, out.data()) == 0 && !*mgvq_reference_reason(), "a reason does not stay");
}

}  // namespace

int main() {
  halves_survive_the_way_to_float_and_back();
  rounding_is_to_nearest_and_ties_go_to_even();
  activations_are_clamped_then_rounded();
  decode_by_hand();
  linears_by_hand();
  embedding_by_hand();
  refusals_say_why();
  return report();
}
