// tensorar::noise_windows on the CPU: one SIMD lane a position; four offsets of the windows are stored at a time.
#include "noise_windows.h"

#include "instruction_sets.h"

namespace tensorar {

FOR_EACH_INSTRUCTION_SET(void noise_run(NoiseWindows op, int64_t sample, int begin, int end, int64_t* scratch);)

// Windows begin .. end - 1 of a sample. `op` is a copy, which no store can change: what depends on it leaves the loops.
void INSTRUCTION_SET::noise_run(NoiseWindows op, int64_t sample, int begin, int end, int64_t* scratch) {
  const int window_size = op.window_size, num_codes = end - begin + window_size - 1;
  const int num_inside = op.num_positions - begin < num_codes ? op.num_positions - begin : num_codes;
  const int64_t row = sample * op.num_positions;
  const uint64_t counter = op.samples_B[sample];
  int64_t *codes = scratch, *chances = codes + num_codes + LANES, *replacements = chances + num_codes + LANES;
  __builtin_memcpy(codes, op.codes_BT + row + begin, num_inside * sizeof(int64_t));
  __builtin_memset(codes + num_inside, 0, (num_codes - num_inside + LANES) * sizeof(int64_t));
  for (int index = 0; op.is_shared && index < num_codes; index += LANES) {
    Lanes chance, replacement;
    op.draw(counter, op.cell(lane_indices() + (begin + index), 0), chance, replacement);
    store(chances + index, chance);
    store(replacements + index, replacement);
  }
  for (int first = begin; first < end; first += LANES) {
    const int count = end - first < LANES ? end - first : LANES;
    const auto column = [&](int offset) {
      const int index = first - begin + offset;
      const Lanes values = load(codes + index);
      const uint64_t threshold = op.thresholds_K[offset];
      if (threshold == 0) return values;
      Lanes chance, replacement;
      if (op.is_shared) {
        chance = load(chances + index);
        replacement = load(replacements + index);
      } else {
        op.draw(counter, op.cell(lane_indices() + first, offset), chance, replacement);
      }
      return chance < threshold ? replacement : values;
    };
    int64_t* windows = op.windows_BTK + (row + first) * window_size;
    int offset = 0;
    for (; offset + 3 < window_size; offset += 4) {
      const Lanes columns[4] = {column(offset), column(offset + 1), column(offset + 2), column(offset + 3)};
      store_columns(windows + offset, window_size, columns, count);
    }
    for (; offset < window_size; ++offset) {
      const Lanes values = column(offset);
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

constexpr int64_t RUN = 512, MIN_ELEMENTS_PER_THREAD = 8192;

Tensor noise_windows_cpu(const Tensor& codes, const Tensor& counters, std::vector<int64_t> thresholds,
                         int64_t codebook_size, std::string coupling, int64_t seed, int64_t step) {
  const Tensor windows = new_windows(codes, thresholds);
  const NoiseWindows op = checked(codes, counters, windows, thresholds, codebook_size, coupling, seed, step);
  const int64_t positions = op.num_positions;
  const auto run = BEST_OF(noise_run);
  const int64_t grain = MIN_ELEMENTS_PER_THREAD / op.window_size;
  torch::stable::parallel_for(0, codes.numel(), grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> scratch(3 * (RUN + op.window_size + 8));
    while (begin < end) {
      const int64_t sample = begin / positions, first = begin % positions;
      const int64_t last = std::min({positions, first + RUN, first + end - begin});
      run(op, sample, first, last, scratch.data());
      begin += last - first;
    }
  });
  return windows;
}

STABLE_TORCH_LIBRARY_IMPL(tensorar, CPU, library) { library.impl("noise_windows", TORCH_BOX(&noise_windows_cpu)); }

}  // namespace
}  // namespace tensorar

#endif
