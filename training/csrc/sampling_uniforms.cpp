// tensorar::sampling_uniforms on the CPU: every uniform of a row of draws.
#include "instruction_sets.h"
#include "sampling_draws.h"

namespace tensorar {

FOR_EACH_INSTRUCTION_SET(void uniforms_run(DrawsRow row, const PhiloxKeys& keys, int64_t codebook_size, float* to);)

void INSTRUCTION_SET::uniforms_run(DrawsRow row, const PhiloxKeys& keys, int64_t codebook_size, float* to) {
  for (int64_t code = 0; code < codebook_size; code += CODES_PER_DRAW) {
    const DrawnLanes uniforms = uniforms_from(row, code, keys);
    if (codebook_size - code >= CODES_PER_DRAW) {
      store(to + code, uniforms);
    } else {
      float last[CODES_PER_DRAW];
      store(last, uniforms);
      __builtin_memcpy(to + code, last, (codebook_size - code) * sizeof(float));
    }
  }
}

}  // namespace tensorar

#ifdef IS_BASELINE

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "check.h"

namespace tensorar {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t MIN_ELEMENTS_PER_THREAD = 16384;

const int64_t* counters_of(const char* name, const Tensor& counters, int64_t num_rows) {
  check(counters.dim() == 1 && counters.size(0) == num_rows && counters.is_contiguous() &&
            counters.scalar_type() == ScalarType::Long && counters.is_cpu(),
        "sampling_uniforms: ", name, " must be contiguous int64 of shape (R,) = (", num_rows, ",) on the CPU");
  return static_cast<const int64_t*>(counters.data_ptr());
}

Tensor sampling_uniforms_cpu(const Tensor& samples, const Tensor& positions, const Tensor& streams,
                             int64_t codebook_size, int64_t seed) {
  check(1 <= codebook_size && codebook_size <= MAX_CODEBOOK_SIZE, "sampling_uniforms: codebook_size must be in [1, ",
        MAX_CODEBOOK_SIZE, "], got ", codebook_size);
  check(0 <= seed && seed < int64_t{1} << 56, "sampling_uniforms: seed must be in [0, 2**56), got ", seed);
  check(samples.dim() == 1, "sampling_uniforms: samples must have one dimension, got ", samples.dim());
  const int64_t num_rows = samples.size(0);
  const int64_t *samples_R = counters_of("samples", samples, num_rows),
                *positions_R = counters_of("positions", positions, num_rows),
                *streams_R = counters_of("streams", streams, num_rows);
  const auto counters_of_row = [&](int64_t row) {
    return DrawsRow{static_cast<uint64_t>(samples_R[row]), static_cast<uint64_t>(positions_R[row]),
                    static_cast<uint64_t>(streams_R[row])};
  };
  for (int64_t row = 0; row < num_rows; ++row) {
    check(counters_of_row(row).is_in_range(), "sampling_uniforms: positions must be in [0, 2**16) and streams in [0, 2**32), ",
          "got ", positions_R[row], " and ", streams_R[row]);
  }
  const Tensor uniforms = torch::stable::new_empty(samples, {num_rows, codebook_size}, ScalarType::Float);
  float* const to = static_cast<float*>(uniforms.data_ptr());
  const PhiloxKeys keys = sampling_keys(seed);
  const auto run = BEST_OF(uniforms_run);
  const int64_t grain = std::max<int64_t>(1, MIN_ELEMENTS_PER_THREAD / codebook_size);
  torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) run(counters_of_row(row), keys, codebook_size, to + row * codebook_size);
  });
  return uniforms;
}

STABLE_TORCH_LIBRARY_IMPL(tensorar, CPU, library) {
  library.impl("sampling_uniforms", TORCH_BOX(&sampling_uniforms_cpu));
}

}  // namespace
}  // namespace tensorar

#endif
