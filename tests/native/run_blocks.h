// Runs the body of a CUDA kernel on the CPU, blocks and threads in an order of the test's.
#pragma once

#include <cstdint>
#include <vector>

#include "check.h"
#include "launch.h"

namespace tensorar {

constexpr int64_t GUARD = 0x5A5A5A5A5A5A5A5A;

// Shared memory starts with the leftovers of other kernels; a write beyond its end is an error.
template <class Body, class Arguments>
void run_blocks(const Arguments& arguments, const std::vector<int64_t>& blocks, const std::vector<int64_t>& threads) {
  check(static_cast<int64_t>(blocks.size()) == Body::num_blocks(arguments) && threads.size() == Body::THREADS,
        "the order must name ", Body::num_blocks(arguments), " blocks and ", Body::THREADS, " threads");
  const std::vector<int> turns(threads.begin(), threads.end());
  const int pairs = Body::shared_pairs(arguments);
  for (const int64_t block : blocks) {
    std::vector<Pair> shared_memory(pairs + 64, Pair{GUARD, GUARD});
    run_on_cpu<Body>(arguments, shared_memory.data(), block, turns.data());
    for (int pair = pairs; pair < pairs + 64; ++pair) {
      check(shared_memory[pair].first == GUARD && shared_memory[pair].second == GUARD, "write beyond shared memory");
    }
  }
}

}  // namespace tensorar
