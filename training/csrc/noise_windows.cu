// tensorar::noise_windows on CUDA devices.
#include "launch_on_stream.h"
#include "noise_windows_op.h"

namespace tensorar {
namespace {

Tensor noise_windows_cuda(const Tensor& codes, const Tensor& counters, std::vector<int64_t> thresholds,
                          int64_t codebook_size, std::string coupling, int64_t seed, int64_t step) {
  const Tensor aligned = is_aligned(codes) ? codes : torch::stable::clone(codes);
  const Tensor windows = new_windows(aligned, thresholds);
  const NoiseWindows op = checked(aligned, counters, windows, thresholds, codebook_size, coupling, seed, step);
  launch_on_stream<NoiseWindowsBody>(op, windows);
  return windows;
}

STABLE_TORCH_LIBRARY_IMPL(tensorar, CUDA, library) { library.impl("noise_windows", TORCH_BOX(&noise_windows_cuda)); }

}  // namespace
}  // namespace tensorar
