// tensorar::noise_windows on the CPU: one SIMD lane a position, one offset of the windows at a time.
#include "noise_windows.h"

#include "instruction_sets.h"

namespace tensorar {

FOR_EACH_INSTRUCTION_SET(void noise_run(const NoiseWindows& op, int64_t sample, int begin, int end, int64_t* scratch);)

// Windows begin .. end - 1 of a sample.
void INSTRUCTION_SET::noise_run(const NoiseWindows& op, int64_t sample, int begin, int end, int64_t* codes) {
  const int window_size = op.window_size, num_codes = end - begin + window_size - 1 + LANES;
  const int num_inside = op.num_positions - begin < num_codes ? op.num_positions - begin : num_codes;
  const int64_t row = sample * op.num_positions;
  __builtin_memcpy(codes, op.codes_BT + row + begin, num_inside * sizeof(int64_t));
  __builtin_memset(codes + num_inside, 0, (num_codes - num_inside) * sizeof(int64_t));

  for (int first = begin; first < end; first += LANES) {
    const int count = end - first < LANES ? end - first : LANES;
    int64_t* windows = op.windows_BTK + (row + first) * window_size;
    for (int offset = 0; offset < window_size; ++offset) {
      Lanes values = load(codes + first - begin + offset);
      if (op.thresholds_K[offset] != 0) {
        Lanes chances, replacements;
        op.draw(op.samples_B[sample], op.cell(lane_indices() + first, offset), chances, replacements);
        values = chances < static_cast<uint64_t>(op.thresholds_K[offset]) ? replacements : values;
      }
      for (int lane = 0; lane < count; ++lane) windows[lane * window_size + offset] = values[lane];
    }
  }
}

}  // namespace tensorar

#ifdef IS_BASELINE

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "noise_windows_op.h"

namespace tensorar {
namespace {

constexpr int64_t RUN = 512, MIN_WINDOWS_PER_THREAD = 2048;

Tensor noise_windows_cpu(const Tensor& codes, const Tensor& counters, std::vector<int64_t> thresholds,
                         int64_t codebook_size, std::string coupling, int64_t seed, int64_t step) {
  const Tensor windows = new_windows(codes, thresholds);
  const NoiseWindows op = checked(codes, counters, windows, thresholds, codebook_size, coupling, seed, step);
  const int64_t positions = op.num_positions;
  torch::stable::parallel_for(0, codes.numel(), MIN_WINDOWS_PER_THREAD, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> scratch(RUN + op.window_size + 8);
    while (begin < end) {
      const int64_t sample = begin / positions, first = begin % positions;
      const int64_t last = std::min({positions, first + RUN, first + end - begin});
      BEST_OF(noise_run)(op, sample, first, last, scratch.data());
      begin += last - first;
    }
  });
  return windows;
}

STABLE_TORCH_LIBRARY_IMPL(tensorar, CPU, library) { library.impl("noise_windows", TORCH_BOX(&noise_windows_cpu)); }

}  // namespace
}  // namespace tensorar

#endif
