// What bounds noise_windows on a CPU: a loop of the same Philox draws that keeps only their sum, and one that writes.
#include "instruction_sets.h"
#include "noise_windows.h"

namespace tensorar {

FOR_EACH_INSTRUCTION_SET(uint64_t philox_run(const PhiloxKeys& keys, int64_t begin, int64_t end);
                         void write_run(int64_t* to, int64_t count);)

// The draws of elements begin .. end - 1 of one sample, as many a lane as fit.
uint64_t INSTRUCTION_SET::philox_run(const PhiloxKeys& keys, int64_t begin, int64_t end) {
  Lanes sum{};
  for (int64_t cell = begin; cell < end; cell += LANES) {
    const Lanes cells = lane_indices() + static_cast<uint64_t>(cell);
    const auto drawn = philox4x32(uint64_t{5}, uint64_t{0}, uint64_t{7}, cells, keys);
    sum ^= drawn.words[0] ^ drawn.words[1];
  }
  uint64_t result = 0;
  for (int lane = 0; lane < LANES; ++lane) result ^= sum[lane];
  return result;
}

void INSTRUCTION_SET::write_run(int64_t* to, int64_t count) {
  for (int64_t index = 0; index + LANES <= count; index += LANES) store(to + index, lane_indices());
}

}  // namespace tensorar

#ifdef IS_BASELINE

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>

namespace tensorar {
namespace {

int64_t philox(int64_t num_draws) {
  const PhiloxKeys keys(3, 1);
  std::atomic<uint64_t> result{0};
  torch::stable::parallel_for(0, num_draws, 2048, [&](int64_t begin, int64_t end) {
    result ^= BEST_OF(philox_run)(keys, begin, end);
  });
  return static_cast<int64_t>(result.load());
}

torch::stable::Tensor write(torch::stable::Tensor like) {
  auto to = torch::stable::new_empty(like, {like.numel()});
  auto* data = static_cast<int64_t*>(to.data_ptr());
  torch::stable::parallel_for(0, to.numel(), 8192, [&](int64_t begin, int64_t end) {
    BEST_OF(write_run)(data + begin, end - begin);
  });
  return to;
}

STABLE_TORCH_LIBRARY(tensorar_ceilings, library) {
  library.def("philox(int num_draws) -> int");
  library.def("write(Tensor like) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(tensorar_ceilings, CompositeExplicitAutograd, library) {
  library.impl("philox", TORCH_BOX(&philox));
}
STABLE_TORCH_LIBRARY_IMPL(tensorar_ceilings, CPU, library) { library.impl("write", TORCH_BOX(&write)); }

}  // namespace
}  // namespace tensorar

#endif
