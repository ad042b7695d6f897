// The emulator against plain loops: fragments of mma.sync as the PTX ISA lays them out, and the faults it must report.
#include <cstdint>
#include <vector>

#include "check.h"
#include "vq_linear/device.cuh"

using namespace mgvq;

namespace {

// One warp multiplies A [16, 16] by B [16, 8] of small integers, whose sums are exact.
void halves_multiply() {
  std::vector<float> a(16 * 16), b(16 * 8), c(16 * 8, -1), expected(16 * 8);
  for (int i = 0; i < 256; ++i) a[i] = static_cast<float>(i * 7 % 23 - 11);
  for (int i = 0; i < 128; ++i) b[i] = static_cast<float>(i * 5 % 19 - 9);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n)
      for (int k = 0; k < 16; ++k) expected[8 * m + n] += a[16 * m + k] * b[8 * k + n];
  const bool fine = emulator::run_grid({1, 1, 1}, {32, 1, 1}, 0, [&] {
    const int g = MGVQ_THREAD / 4, q = MGVQ_THREAD % 4;
    const auto pair = [&](int m, int k) { return pack_halves(a[16 * m + k], a[16 * m + k + 1]); };
    const uint32_t left[4] = {pair(g, 2 * q), pair(g + 8, 2 * q), pair(g, 2 * q + 8), pair(g + 8, 2 * q + 8)};
    const uint32_t right[2] = {pack_halves(b[8 * (2 * q) + g], b[8 * (2 * q + 1) + g]),
                               pack_halves(b[8 * (2 * q + 8) + g], b[8 * (2 * q + 9) + g])};
    float sums[4] = {};
    mma(sums, left, right);
    for (int i = 0; i < 4; ++i) c[8 * (g + 8 * (i / 2)) + 2 * q + i % 2] = sums[i];
  });
  EXPECT(fine, "the launch");
  for (int i = 0; i < 128; ++i) EXPECT(c[i] == expected[i], "element %d: %g, not %g", i, c[i], expected[i]);
}

// A [16, 32] by B [32, 8], int8.
void bytes_multiply() {
  std::vector<int> a(16 * 32), b(32 * 8), c(16 * 8, -1), expected(16 * 8);
  for (int i = 0; i < 512; ++i) a[i] = i * 37 % 255 - 127;
  for (int i = 0; i < 256; ++i) b[i] = i * 53 % 255 - 127;
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n)
      for (int k = 0; k < 32; ++k) expected[8 * m + n] += a[32 * m + k] * b[8 * k + n];
  emulator::run_grid({1, 1, 1}, {32, 1, 1}, 0, [&] {
    const int g = MGVQ_THREAD / 4, q = MGVQ_THREAD % 4;
    uint32_t left[4] = {}, right[2] = {};
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) {
        left[i] |= static_cast<uint32_t>(a[32 * (g + 8 * (i % 2)) + 4 * q + 16 * (i / 2) + j] & 0xff) << (8 * j);
        if (i < 2) right[i] |= static_cast<uint32_t>(b[8 * (4 * q + 16 * i + j) + g] & 0xff) << (8 * j);
      }
    int32_t sums[4] = {};
    mma(sums, left, right);
    for (int i = 0; i < 4; ++i) c[8 * (g + 8 * (i / 2)) + 2 * q + i % 2] = sums[i];
  });
  for (int i = 0; i < 128; ++i) EXPECT(c[i] == expected[i], "element %d: %d, not %d", i, c[i], expected[i]);
}

void faults_are_reported() {
  const auto fails = [](std::size_t shared, auto body) { return !emulator::run_grid({1, 1, 1}, {64, 1, 1}, shared, body); };
  EXPECT(fails(64, [] { shared_word(64); }), "a read out of bounds");
  EXPECT(fails(64, [] { shared_word(0); }), "a read before a write");
  EXPECT(fails(64, [] { put_shared(2, 1); }), "a write off its alignment");
  EXPECT(fails(256, [] { put_shared(4 * MGVQ_THREAD, 1), shared_word(4 * (MGVQ_THREAD / 2)); }), "a read of another's write");
  EXPECT(fails(256, [] { put_shared(4 * (MGVQ_THREAD / 2), 1); }), "a write over another's");
  EXPECT(fails(256, [] {
    put_shared(4 * MGVQ_THREAD, 1);
    sync_threads();
    shared_word(4 * (63 - MGVQ_THREAD));
    put_shared(4 * MGVQ_THREAD, 2);
  }), "a write over what another has just read");
  EXPECT(!fails(256, [] {
    put_shared(4 * MGVQ_THREAD, 1);
    sync_threads();
    shared_word(0), shared_word(4 * (63 - MGVQ_THREAD));
    sync_threads();
    put_shared(4 * (63 - MGVQ_THREAD), 2);
  }), "barriers between, and many readers");
  EXPECT(fails(0, [] { if (MGVQ_THREAD < 40) sync_threads(); }), "a barrier that some never reach");
  EXPECT(fails(0, [] {
    float sums[4] = {};
    if (MGVQ_THREAD % 2) mma(sums, {0, 0, 0, 0}, {0, 0});
  }), "an mma of half a warp");
  alignas(16) static const unsigned char bytes[64] = {};
  EXPECT(fails(0, [] {
    uint32_t words[4];
    load_stream<4>(bytes + 4, words);
  }), "a vector load off its alignment");
}

}  // namespace

int main() {
  halves_multiply();
  bytes_multiply();
  faults_are_reported();
  EXPECT(permute_bytes(0x33221100u, 0x77665544u, 0x5504u) == 0x55550044u, "%08x", permute_bytes(0x33221100u, 0x77665544u, 0x5504u));
  EXPECT(funnel_right(0x89abcdefu, 0x01234567u, 8) == 0x6789abcdu, "%08x", funnel_right(0x89abcdefu, 0x01234567u, 8));
  return report();
}
