// Some compilers ask for glibc's checked longjmp, which takes a jump to another stack for a mistake.
#undef _FORTIFY_SOURCE
#include "emulator/emulator.h"

#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

namespace mgvq::emulator {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr std::size_t kStackBytes = 64 * 1024;
constexpr unsigned kWarp = 32;
constexpr unsigned kNobody = ~0u, kSeveral = ~0u - 1;

// A fiber's first turn goes through its context, which has its stack; all later ones through _setjmp and _longjmp, because
// swapcontext asks the kernel for the signal mask each time.
struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool has_begun = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool finished = false;
};

// What the lanes of a warp bring to one mma, and how many have.
struct Warp {
  unsigned arrived = 0;
  uint64_t generation = 0;
  uint32_t a[kWarp][4], b[kWarp][2];
  float product[16][8];
  int32_t integers[16][8];
};

// A word of shared memory, and who touched it since which barrier: two threads may not touch one between two barriers
// unless both read. Fibers run in one order only; this finds the races of all the others.
struct SharedWord {
  uint32_t value = 0xdeadbeefu;
  unsigned writer = kNobody, reader = kNobody;
  uint64_t written_at = 0, read_at = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<SharedWord> shared;
  jmp_buf scheduler;
  unsigned current = 0, alive = 0, waiting = 0;
  uint64_t barrier = 0, progress = 0;
  bool failed = false;
};

Block* block = nullptr;
const std::function<void()>* kernel = nullptr;

void yield_fiber() {
  if (_setjmp(block->fibers[block->current].resume) == 0) _longjmp(block->scheduler, 1);
}

void start_fiber() {
  (*kernel)();
  Fiber& mine = block->fibers[block->current];
  mine.finished = true;
  --block->alive;
  ++block->progress;
  _longjmp(block->scheduler, 1);
}

// Runs a fiber until it yields or ends.
void turn_of(Fiber& fiber) {
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.has_begun) _longjmp(fiber.resume, 1);
  fiber.has_begun = true;
  setcontext(&fiber.context);
}

Index index_of(unsigned linear, const Index& size) {
  return {linear % size.x, linear / size.x % size.y, linear / size.x / size.y};
}

// All fibers in turn until none is left; a whole round in which nothing moved is a deadlock.
void run_block(const Index& size) {
  while (block->alive && !block->failed) {
    const uint64_t before = block->progress;
    for (unsigned i = 0; i < block->fibers.size() && !block->failed; ++i) {
      if (block->fibers[i].finished) continue;
      block->current = i;
      thread_index = index_of(i, size);
      turn_of(block->fibers[i]);
    }
    if (block->progress == before && !block->failed) fault("threads wait at collectives that others never reach");
  }
}

void start_block(Block& fresh, std::size_t shared_bytes, unsigned threads) {
  fresh.shared.assign((shared_bytes + 3) / 4, SharedWord{});
  fresh.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  fresh.alive = threads;
  fresh.waiting = 0;
  for (Fiber& fiber : fresh.fibers) {
    fiber.finished = fiber.has_begun = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start_fiber, 0);
  }
}

// Brings the lane's operands; the last lane to arrive computes. Returns this lane's warp.
template <typename Compute>
Warp& join_warp(const uint32_t (&a)[4], const uint32_t (&b)[2], Compute compute) {
  Warp& warp = block->warps[block->current / kWarp];
  const unsigned lane = block->current % kWarp;
  std::memcpy(warp.a[lane], a, sizeof a);
  std::memcpy(warp.b[lane], b, sizeof b);
  const uint64_t mine = warp.generation;
  ++block->progress;
  if (++warp.arrived == kWarp) {
    compute(warp);
    warp.arrived = 0;
    ++warp.generation;
  }
  while (warp.generation == mine && !block->failed) yield_fiber();
  return warp;
}

float half_at(uint32_t word, unsigned which) { return float_from_half(static_cast<uint16_t>(word >> (16 * which))); }
int32_t byte_at(uint32_t word, unsigned which) { return static_cast<int8_t>(word >> (8 * which)); }

}  // namespace

void fault(const char* what) {
  if (!block->failed)
    std::fprintf(stderr, "emulator: block %u thread %u: %s\n", block_index.x, thread_index.x, what);
  block->failed = true;
}

bool run_grid(Index grid, Index size, std::size_t shared_bytes, const std::function<void()>& body) {
  const unsigned threads = size.x * size.y * size.z;
  Block state;
  state.fibers = std::vector<Fiber>(threads);
  block = &state;
  kernel = &body;
  block_size = size;
  grid_size = grid;
  for (unsigned i = 0; i < grid.x * grid.y * grid.z && !state.failed; ++i) {
    block_index = index_of(i, grid);
    start_block(state, shared_bytes, threads);
    run_block(size);
  }
  block = nullptr;
  return !state.failed;
}

void sync_threads() {
  const uint64_t mine = block->barrier;
  ++block->progress;
  if (++block->waiting == block->fibers.size()) {
    block->waiting = 0;
    ++block->barrier;
  }
  while (block->barrier == mine && !block->failed) yield_fiber();
}

uint32_t read_shared(uint32_t offset) {
  if (offset % 4 || offset / 4 >= block->shared.size()) {
    fault("shared memory read out of bounds or off its alignment");
    return 0;
  }
  SharedWord& word = block->shared[offset / 4];
  if (word.writer == kNobody) fault("shared memory read before it was written");
  if (word.written_at == block->barrier && word.writer != block->current)
    fault("shared memory read that another thread wrote since the last barrier");
  const bool is_first = word.reader == kNobody || word.read_at != block->barrier;
  word.reader = is_first || word.reader == block->current ? block->current : kSeveral;
  word.read_at = block->barrier;
  return word.value;
}

void write_shared(uint32_t offset, uint32_t value) {
  if (offset % 4 || offset / 4 >= block->shared.size()) return fault("shared memory written out of bounds");
  SharedWord& word = block->shared[offset / 4];
  if (word.writer != kNobody && word.written_at == block->barrier && word.writer != block->current)
    fault("shared memory written that another thread wrote since the last barrier");
  if (word.reader != kNobody && word.read_at == block->barrier && word.reader != block->current)
    fault("shared memory written that another thread read since the last barrier");
  word.writer = block->current;
  word.written_at = block->barrier;
  word.value = value;
}

// A 16x16 row-major: a0 (g, 2q), a1 (g+8, 2q), a2 (g, 2q+8), a3 (g+8, 2q+8), two columns each; B 16x8: b0 (2q, g),
// b1 (2q+8, g), two rows each; C 16x8: c0 c1 (g, 2q), c2 c3 (g+8, 2q); lane = 4·g + q.
void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Warp& warp = join_warp(a, b, [](Warp& w) {
    double left[16][16], right[8][16];
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned q = k % 8 / 2, half = k / 8;
      for (unsigned m = 0; m < 16; ++m) left[m][k] = half_at(w.a[4 * (m % 8) + q][m / 8 + 2 * half], k % 2);
      for (unsigned n = 0; n < 8; ++n) right[n][k] = half_at(w.b[4 * n + q][half], k % 2);
    }
    for (unsigned m = 0; m < 16; ++m)
      for (unsigned n = 0; n < 8; ++n) {
        double sum = 0;
        for (unsigned k = 0; k < 16; ++k) sum += left[m][k] * right[n][k];
        w.product[m][n] = static_cast<float>(sum);
      }
  });
  const unsigned lane = block->current % kWarp, g = lane / 4, q = lane % 4;
  for (unsigned i = 0; i < 4; ++i) c[i] += warp.product[g + 8 * (i / 2)][2 * q + i % 2];
}

// A 16x32: a0 (g, 4q), a1 (g+8, 4q), a2 (g, 4q+16), a3 (g+8, 4q+16), four columns each; B 32x8: b0 (4q, g), b1 (4q+16, g).
void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Warp& warp = join_warp(a, b, [](Warp& w) {
    for (unsigned m = 0; m < 16; ++m)
      for (unsigned n = 0; n < 8; ++n) {
        int32_t sum = 0;
        for (unsigned k = 0; k < 32; ++k) {
          const unsigned q = k % 16 / 4, half = k / 16;
          sum += byte_at(w.a[4 * (m % 8) + q][m / 8 + 2 * half], k % 4) * byte_at(w.b[4 * n + q][half], k % 4);
        }
        w.integers[m][n] = sum;
      }
  });
  const unsigned lane = block->current % kWarp, g = lane / 4, q = lane % 4;
  for (unsigned i = 0; i < 4; ++i) c[i] += warp.integers[g + 8 * (i / 2)][2 * q + i % 2];
}

#if defined(__aarch64__)
using Binary16 = __fp16;  // GCC knows _Float16 in C++ since 13, a Jetson's is older
#else
using Binary16 = _Float16;
#endif

float float_from_half(uint16_t half) {
  Binary16 value;
  std::memcpy(&value, &half, sizeof value);
  return static_cast<float>(value);
}

uint16_t half_from_float(float value) {
  const Binary16 rounded = static_cast<Binary16>(value);
  uint16_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return bits;
}

}  // namespace mgvq::emulator

namespace {
cudaError_t last_error = cudaSuccess;
}

namespace mgvq::emulator {
void set_last_error(cudaError_t error) { last_error = error; }
}  // namespace mgvq::emulator

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 8; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 8; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 7; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 163 * 1024; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == cudaErrorInvalidValue ? "invalid argument" : "launch failure";
}
