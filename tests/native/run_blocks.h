// Runs the body of a CUDA kernel on the CPU, blocks and threads in an order of the test's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
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

inline std::vector<int64_t> turns(int64_t count, int64_t seed) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (seed != 0) std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
  return order;
}

// In place of a launch: blocks and threads in an order that the seed determines (0: ascending).
struct InOrder {
  int64_t seed;

  template <class Body, class Arguments, class Tensor>
  void run(const Arguments& arguments, const Tensor&) const {
    run_blocks<Body>(arguments, turns(Body::num_blocks(arguments), seed), turns(Body::THREADS, seed));
  }
};

}  // namespace tensorar
