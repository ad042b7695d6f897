// CUDA on host memory, for kernels that keep to vq_linear/device.cuh: the same .cu files compile as C++ with
// -DMGVQ_EMULATE and their launchers run on host pointers, so that indices, layouts, tails and reductions are proved on a
// machine without a GPU. It says nothing about speed.
//
// Each thread of a block is a fiber; fibers run one after another and stop only at collectives (mma: 32 lanes;
// __syncthreads: the block). Blocks run one after another. What the hardware would leave undefined is an error here: a
// collective that some lanes never reach; shared memory out of bounds, read before it was written, or touched by two
// threads between two barriers of which one writes; vector loads off their alignment. An error ends the launch with cudaErrorLaunchFailure and a line on stderr.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace mgvq::emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Of the running fiber.
extern Index thread_index, block_index, block_size, grid_size;

// Runs `body` for every thread of the grid; true when nothing went wrong.
bool run_grid(Index grid, Index block, std::size_t shared_bytes, const std::function<void()>& body);

void sync_threads();

// Shared memory of the running block: 4 bytes at a byte offset, checked; and the unchecked base for zero-cost pointers is
// deliberately not offered.
uint32_t read_shared(uint32_t offset);
void write_shared(uint32_t offset, uint32_t value);

// Reports a fault of the running thread; the launch fails.
void fault(const char* what);

// D = A·B + C for mma.sync.m16n8k16 f16 → f32 and m16n8k32 s8 → s32; fragments as PTX ISA 9.7.14.5 lays them out.
void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

float float_from_half(uint16_t half);
uint16_t half_from_float(float value);

}  // namespace mgvq::emulator
