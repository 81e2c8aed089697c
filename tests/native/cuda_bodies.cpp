// The bodies of the CUDA kernels as ops on CPU tensors: the same source, blocks and threads in an order of the test's.
#ifdef IS_BASELINE

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <vector>

#include "noise_windows_op.h"

namespace tensorar {
namespace {

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

Tensor noise_windows(const Tensor& codes, const Tensor& counters, std::vector<int64_t> thresholds,
                     int64_t codebook_size, std::string coupling, int64_t seed, int64_t step,
                     std::vector<int64_t> blocks, std::vector<int64_t> threads) {
  Tensor windows = new_windows(codes, thresholds);
  torch::stable::fill_(windows, -1);
  const NoiseWindows op = checked(codes, counters, windows, thresholds, codebook_size, coupling, seed, step);
  run_blocks<NoiseWindowsBody>(op, blocks, threads);
  return windows;
}

STABLE_TORCH_LIBRARY(tensorar_cuda_bodies, library) {
  library.def(
      "noise_windows(Tensor codes, Tensor sample_counters, int[] thresholds, int codebook_size, str coupling, "
      "int seed, int step, int[] blocks, int[] threads) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tensorar_cuda_bodies, CPU, library) {
  library.impl("noise_windows", TORCH_BOX(&noise_windows));
}

}  // namespace
}  // namespace tensorar

#endif
