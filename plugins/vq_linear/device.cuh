// The instructions that kernels use, once as PTX and once for the emulator (emulator/emulator.h). Everything a kernel does
// beyond plain C++ goes through here; that is what lets the same kernels run, and be tested, without a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(MGVQ_EMULATE)

#include <algorithm>
#include <cmath>

#include "emulator/emulator.h"

#define MGVQ_KERNEL(threads, blocks) static void
#define MGVQ_DEVICE inline
#define MGVQ_UNROLL
#define MGVQ_NO_UNROLL
#define MGVQ_THREAD ::mgvq::emulator::thread_index.x
#define MGVQ_BLOCK ::mgvq::emulator::block_index.x
#define MGVQ_BLOCK_Y ::mgvq::emulator::block_index.y
#define MGVQ_BLOCKS ::mgvq::emulator::grid_size.x
#define MGVQ_THREADS ::mgvq::emulator::block_size.x

namespace mgvq {
namespace emulator {
void set_last_error(cudaError_t error);
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t select) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(both >> (8 * (select >> (4 * i) & 7)) & 0xff) << (8 * i);
  return out;
}
// (high:low) >> bits, the low word of it; bits in 0..31.
inline uint32_t funnel_right(uint32_t low, uint32_t high, int bits) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> bits);
}
inline uint32_t shared_word(uint32_t offset) { return emulator::read_shared(offset); }
inline void put_shared(uint32_t offset, uint32_t word) { emulator::write_shared(offset, word); }
inline void put_shared4(uint32_t offset, uint32_t word) {
  if (offset % 16) emulator::fault("16-byte store to shared memory off its alignment");
  for (uint32_t i = 0; i < 16; i += 4) emulator::write_shared(offset + i, word);
}
inline void shared_words(uint32_t offset, uint32_t (&out)[4]) {
  if (offset % 16) emulator::fault("16-byte load from shared memory off its alignment");
  for (uint32_t i = 0; i < 4; ++i) out[i] = emulator::read_shared(offset + 4 * i);
}
inline void sync_threads() { emulator::sync_threads(); }
template <int Words>
inline void load_stream(const void* from, uint32_t (&out)[Words]) {
  if (reinterpret_cast<uintptr_t>(from) % (4 * Words == 12 ? 4 : 4 * Words)) emulator::fault("vector load off its alignment");
  std::memcpy(out, from, 4 * Words);
}
template <int Words>
inline void put_words(void* to, const uint32_t (&words)[Words]) {
  if (reinterpret_cast<uintptr_t>(to) % (4 * Words)) emulator::fault("vector store off its alignment");
  std::memcpy(to, words, 4 * Words);
}
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulator::mma_f16(c, a, b); }
inline void mma(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulator::mma_s8(c, a, b); }
inline float float_of_half(uint16_t half) { return emulator::float_from_half(half); }
inline uint16_t half_of_float(float value) { return emulator::half_from_float(value); }
inline uint32_t subtract_halves(uint32_t a, uint32_t b) {
  const auto one = [](uint32_t x, uint32_t y) { return static_cast<uint32_t>(half_of_float(float_of_half(x) - float_of_half(y))); };
  return one(a & 0xffff, b & 0xffff) | one(a >> 16, b >> 16) << 16;
}
// NaN gives 0, as cvt.rni.s32.f32 does.
inline int round_to_int(float value) { return value != value ? 0 : static_cast<int>(std::nearbyint(value)); }
inline float clamped(float value, float limit) { return value != value ? value : std::fmin(std::fmax(value, -limit), limit); }

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), unsigned blocks, unsigned blocks_y, unsigned threads,
                   std::size_t shared_bytes, cudaStream_t, Arguments... arguments) {
  const bool fine = emulator::run_grid({blocks, blocks_y, 1}, {threads, 1, 1}, shared_bytes,
                                       [&] { kernel(static_cast<Parameters>(arguments)...); });
  return fine ? cudaSuccess : cudaErrorLaunchFailure;
}
}  // namespace mgvq

#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define MGVQ_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define MGVQ_DEVICE __device__ __forceinline__
#define MGVQ_UNROLL _Pragma("unroll")
#define MGVQ_NO_UNROLL _Pragma("unroll 1")
#define MGVQ_THREAD threadIdx.x
#define MGVQ_BLOCK blockIdx.x
#define MGVQ_BLOCK_Y blockIdx.y
#define MGVQ_BLOCKS gridDim.x
#define MGVQ_THREADS blockDim.x

namespace mgvq {

extern __shared__ __align__(16) unsigned char shared_bytes_of_block[];

MGVQ_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t select) { return __byte_perm(a, b, select); }
MGVQ_DEVICE uint32_t funnel_right(uint32_t low, uint32_t high, int bits) { return __funnelshift_r(low, high, bits); }
// A volatile load would pin the order of lookups and keep ptxas from hiding their latency behind the mma.
MGVQ_DEVICE uint32_t shared_word(uint32_t offset) {
  return *reinterpret_cast<const uint32_t*>(shared_bytes_of_block + offset);
}
MGVQ_DEVICE void put_shared(uint32_t offset, uint32_t word) {
  *reinterpret_cast<uint32_t*>(shared_bytes_of_block + offset) = word;
}
MGVQ_DEVICE void put_shared4(uint32_t offset, uint32_t word) {
  *reinterpret_cast<uint4*>(shared_bytes_of_block + offset) = make_uint4(word, word, word, word);
}
MGVQ_DEVICE void shared_words(uint32_t offset, uint32_t (&out)[4]) {
  const uint4 words = *reinterpret_cast<const uint4*>(shared_bytes_of_block + offset);
  out[0] = words.x, out[1] = words.y, out[2] = words.z, out[3] = words.w;
}
MGVQ_DEVICE void sync_threads() { __syncthreads(); }

// Weights are read once: past L1, and L2 may forget them.
template <int Words>
MGVQ_DEVICE void load_stream(const void* from, uint32_t (&out)[Words]) {
  static_assert(Words >= 1 && Words <= 4, "a lane's plane has 4, 8, 12 or 16 bytes");
  if constexpr (Words == 4) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "l"(from));
  } else if constexpr (Words == 2) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(out[0]), "=r"(out[1]) : "l"(from));
  } else {
    MGVQ_UNROLL for (int i = 0; i < Words; ++i)
      asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];"
                   : "=r"(out[i]) : "l"(static_cast<const uint32_t*>(from) + i));
  }
}

// One store of 8 or 16 bytes, aligned to its size.
template <int Words>
MGVQ_DEVICE void put_words(void* to, const uint32_t (&words)[Words]) {
  static_assert(Words == 2 || Words == 4, "8 or 16 bytes");
  if constexpr (Words == 2)
    *static_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  else
    *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

MGVQ_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
MGVQ_DEVICE void mma(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

MGVQ_DEVICE float float_of_half(uint16_t half) { return __half2float(__ushort_as_half(half)); }
MGVQ_DEVICE uint16_t half_of_float(float value) { return __half_as_ushort(__float2half_rn(value)); }
MGVQ_DEVICE uint32_t subtract_halves(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
MGVQ_DEVICE int round_to_int(float value) { return __float2int_rn(value); }
// NaN stays NaN: a broken activation must show.
MGVQ_DEVICE float clamped(float value, float limit) { return value != value ? value : fminf(fmaxf(value, -limit), limit); }

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), unsigned blocks, unsigned blocks_y, unsigned threads,
                   std::size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<dim3(blocks, blocks_y), threads, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
}
}  // namespace mgvq

#endif

namespace mgvq {

MGVQ_DEVICE uint32_t pack_halves(float low, float high) {
  return half_of_float(low) | static_cast<uint32_t>(half_of_float(high)) << 16;
}
MGVQ_DEVICE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
MGVQ_DEVICE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline constexpr float kLargestHalf = 65504.0f;

// A bfloat16 is a float32's upper half.
MGVQ_DEVICE float float_of_bfloat(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }
// Nearest, ties to even; NaN stays NaN, and what lies beyond the largest becomes infinite by the carry.
MGVQ_DEVICE uint16_t bfloat_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace mgvq
