// A stand-in for CUDA's header that runs the kernels of quantize.cu on the host, for the tests alone: the threads of a
// block are fibers that switch at barriers, so that what each thread reads, writes and exchanges is what it would on a
// GPU, one block after the other. It says nothing about speed, and nothing about races between barriers.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

namespace emulation {

constexpr size_t kStackBytes = 256 << 10;
constexpr unsigned kLanes = 32;

enum class State { running, at_warp_barrier, at_block_barrier, done };

struct Fiber {
  ucontext_t context;
  State state;
  dim3 index;
  std::unique_ptr<char[]> stack;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current;
inline std::function<void()> body;
inline uint32_t posted[1024][8];

inline void enter() {
  body();
  fibers[current].state = State::done;
}

inline void wait(State barrier) {
  fibers[current].state = barrier;
  swapcontext(&fibers[current].context, &scheduler);
}

// Lets fibers [first, last) go on if those of them that still run all wait at a barrier of this kind.
inline bool release(unsigned first, unsigned last, State barrier) {
  bool any = false;
  for (unsigned i = first; i < last; ++i) {
    if (fibers[i].state == State::done) continue;
    if (fibers[i].state != barrier) return false;
    any = true;
  }
  for (unsigned i = first; i < last; ++i) {
    if (fibers[i].state != State::done) fibers[i].state = State::running;
  }
  return any;
}

inline void run_block(unsigned threads) {
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    fiber.state = State::running;
    fiber.index = dim3(i % blockDim.x, i / blockDim.x);
    makecontext(&fiber.context, enter, 0);
  }
  for (;;) {
    bool any = false;
    for (current = 0; current < threads; ++current) {
      if (fibers[current].state != State::running) continue;
      threadIdx = fibers[current].index;
      swapcontext(&scheduler, &fibers[current].context);
      any = true;
    }
    for (unsigned warp = 0; warp < threads; warp += kLanes) any |= release(warp, warp + kLanes, State::at_warp_barrier);
    any |= release(0, threads, State::at_block_barrier);
    if (any) continue;
    for (unsigned i = 0; i < threads; ++i) {
      if (fibers[i].state == State::done) continue;
      std::fprintf(stderr, "thread %u waits at a barrier that others never reach\n", i);
      std::abort();
    }
    return;
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::State::at_block_barrier); }
inline void __syncwarp() { emulation::wait(emulation::State::at_warp_barrier); }

inline int __syncthreads_or(int value) {
  emulation::posted[emulation::current][0] = value != 0;
  __syncthreads();
  int any = 0;
  for (unsigned i = 0; i < blockDim.x * blockDim.y; ++i) any |= static_cast<int>(emulation::posted[i][0]);
  __syncthreads();
  return any;
}

inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, int distance) {
  emulation::posted[emulation::current][0] = value;
  __syncwarp();
  const uint32_t other = emulation::posted[emulation::current ^ static_cast<unsigned>(distance)][0];
  __syncwarp();
  return other;
}

inline unsigned atomicMax(unsigned* at, unsigned value) {
  const unsigned before = *at;
  *at = std::max(before, value);
  return before;
}

namespace fp4::cuda {

// What `kernel<<<grid, block, 0, stream>>>(arguments...)` is to nvcc.
template <typename... Parameters, typename... Arguments>
void enqueue(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t, Arguments... arguments) {
  gridDim = grid;
  blockDim = block;
  emulation::body = [&] { kernel(arguments...); };
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      emulation::run_block(block.x * block.y);
    }
  }
}

// mma.sync.m16n8k16 as the PTX manual lays out its fragments (section "Matrix Fragments for mma.m16n8k16").
template <typename T>
void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  using emulation::current;
  using emulation::posted;
  const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(posted[current], mine, sizeof mine);
  __syncwarp();
  const unsigned warp = current / emulation::kLanes * emulation::kLanes, lane = current - warp;
  const auto element = [&](unsigned row_of_lanes, unsigned word, unsigned k) {
    const uint32_t bits = posted[warp + row_of_lanes * 4 + k % 8 / 2][word + k / 8 * (word < 4 ? 2 : 1)];
    if constexpr (sizeof(T) == 2) {
      return widen(T{static_cast<uint16_t>(bits >> k % 2 * 16)});
    } else {
      return 0.0f;
    }
  };
  for (unsigned i = 0; i < 4; ++i) {
    for (unsigned k = 0; k < 16; ++k) {
      // Row lane / 4 (+ 8 for i >= 2) of a, column 2 (lane % 4) + i % 2 of b.
      c[i] = std::fma(element(lane / 4, i / 2, k), element(2 * (lane % 4) + i % 2, 4, k), c[i]);
    }
  }
  __syncwarp();
}

}  // namespace fp4::cuda
