// What the host sides of tensorar::noise_windows share: checks, the result, and the arguments of the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "noise_windows.h"

namespace tensorar {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  check(low <= value && value <= high, "noise_windows: ", name, " must be in [", low, ", ", high, "], got ", value);
}

inline Tensor new_windows(const Tensor& codes, const std::vector<int64_t>& thresholds) {
  check(codes.dim() == 2 && codes.scalar_type() == ScalarType::Long && codes.is_contiguous(),
        "noise_windows: codes must be contiguous int64 of shape (B, T)");
  return torch::stable::new_empty(codes, {codes.size(0), codes.size(1), static_cast<int64_t>(thresholds.size())});
}

// Raises where an argument would be out of a kernel's range.
inline NoiseWindows checked(const Tensor& codes, const Tensor& counters, const Tensor& windows,
                            const std::vector<int64_t>& thresholds, int64_t codebook_size, const std::string& coupling,
                            int64_t seed, int64_t step) {
  check(counters.dim() == 1 && counters.size(0) == codes.size(0) && counters.is_contiguous() &&
                      counters.scalar_type() == ScalarType::Long,
                  "noise_windows: sample_counters must be contiguous int64 of shape (B,) = (", codes.size(0), ",)");
  check(counters.is_cuda() == codes.is_cuda() && counters.get_device() == codes.get_device(),
                  "noise_windows: sample_counters must be on the device of codes");
  check(coupling == "shared" || coupling == "independent",
                  "noise_windows: coupling must be 'independent' or 'shared', got '", coupling, "'");
  check_range("window_size", thresholds.size(), 1, NoiseWindows::MAX_WINDOW_SIZE);
  check_range("num_positions", codes.size(1), 1, NoiseWindows::MAX_POSITIONS);
  check_range("codebook_size", codebook_size, 1, (int64_t{1} << 31) - 1);
  check_range("seed", seed, 0, (int64_t{1} << 56) - 1);
  check_range("step", step, 0, (int64_t{1} << 32) - 1);
  check_range("threshold of offset 0", thresholds[0], 0, 0);
  for (const int64_t threshold : thresholds) check_range("threshold", threshold, 0, int64_t{1} << 32);

  const bool is_shared = coupling == "shared";
  const uint32_t purpose = is_shared ? 2 : 1;  // NOISE_SHARED, NOISE_INDEPENDENT of training/philox.py
  NoiseWindows op{};
  op.codes_BT = static_cast<const int64_t*>(codes.data_ptr());
  op.samples_B = static_cast<const int64_t*>(counters.data_ptr());
  op.windows_BTK = static_cast<int64_t*>(windows.data_ptr());
  op.num_samples = codes.size(0);
  op.num_positions = codes.size(1);
  op.window_size = thresholds.size();
  op.is_shared = is_shared;
  op.codebook_size = codebook_size;
  op.step = step;
  op.keys = PhiloxKeys(seed & 0xFFFFFFFF, purpose | static_cast<uint32_t>(seed >> 32) << 8);
  std::copy(thresholds.begin(), thresholds.end(), op.thresholds_K);
  return op;
}

}  // namespace tensorar
