// The bodies of the CUDA kernels as ops on CPU tensors: the same source, blocks and threads in an order of the test's.
#ifdef IS_BASELINE

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <vector>

#include "noise_windows_op.h"
#include "run_blocks.h"

namespace tensorar {
namespace {

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
