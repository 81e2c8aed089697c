// How the body of a CUDA kernel is run: by a CUDA grid, or block by block on the CPU, where tests read its results.
//
// A body is a struct with THREADS, BLOCKS_AT_ONCE (that a multiprocessor should hold, which bounds a thread's registers),
// num_blocks and shared_pairs (of the arguments), a constructor (arguments, shared memory, block index), and
// run(barrier_after), which hands over one phase after the other, each a function of the thread: all threads of a block
// end a phase before one begins the next. barrier_after.by_warps hands over one phase in which every warp has phases of
// its own: a function of the warp and of a barrier_after whose phases are functions of the lane.
#pragma once

#include "lanes.h"

namespace tensorar {

// What one load or store of a thread moves at best.
struct alignas(16) Pair {
  int64_t first, second;
};

// Division of small numbers by one that all threads share; exact where number * divisor < 2**32.
struct Divisor {
  uint32_t divisor;
  uint64_t magic;

  HOST_DEVICE explicit Divisor(uint32_t divisor) : divisor(divisor), magic((uint64_t{1} << 32) / divisor + 1) {}
  HOST_DEVICE uint32_t quotient(uint32_t number) const { return static_cast<uint32_t>(number * magic >> 32); }
  HOST_DEVICE uint32_t remainder(uint32_t number) const { return number - quotient(number) * divisor; }
};

constexpr int WARP = 32;  // threads

#if defined(__CUDACC__)

struct BarrierOfBlock {
  template <class Phase>
  __device__ void operator()(Phase phase) const {
    phase(static_cast<int>(threadIdx.x));
    __syncthreads();
  }

  template <class Phases>
  __device__ void by_warps(Phases phases) const {
    phases(static_cast<int>(threadIdx.x) / WARP, [](auto phase) {
      phase(static_cast<int>(threadIdx.x) % WARP);
      __syncwarp();
    });
    __syncthreads();
  }
};

template <class Body, class Arguments>
__global__ void __launch_bounds__(Body::THREADS, Body::BLOCKS_AT_ONCE) run_on_grid(const __grid_constant__ Arguments arguments) {
  extern __shared__ Pair shared_memory[];
  Body(arguments, shared_memory, blockIdx.x).run(BarrierOfBlock{});
}

#else

// `threads` is the order in which the threads of the block take their turns, and its warps in that of their first lanes.
template <int THREADS>
struct TurnsOfThreads {
  const int* threads;

  template <class Phase>
  void operator()(Phase phase) const {
    for (int turn = 0; turn < THREADS; ++turn) phase(threads[turn]);
  }

  template <class Phases>
  void by_warps(Phases phases) const {
    (*this)([&](int first) {
      if (first % WARP != 0) return;
      phases(first / WARP, [&](auto phase) {
        (*this)([&](int thread) {
          if (thread / WARP == first / WARP) phase(thread % WARP);
        });
      });
    });
  }
};

template <class Body, class Arguments>
void run_on_cpu(const Arguments& arguments, Pair* shared_memory, int64_t block, const int* threads) {
  Body(arguments, shared_memory, block).run(TurnsOfThreads<Body::THREADS>{threads});
}

#endif

}  // namespace tensorar
