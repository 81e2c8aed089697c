// tensorar::sampling_uniforms on the CPU: one SIMD lane a Philox call, four codes a call.
#include "instruction_sets.h"
#include "philox.h"

namespace tensorar {

// What a row of draws depends on besides the code.
struct UniformsRow {
  uint64_t sample, position, stream;
};

FOR_EACH_INSTRUCTION_SET(void uniforms_run(UniformsRow row, const PhiloxKeys& keys, int64_t codebook_size, float* to);)

typedef int32_t HalfLanes __attribute__((vector_size(LANES * 8)));
typedef float FloatLanes __attribute__((vector_size(LANES * 8)));
typedef float FloatLanesInMemory __attribute__((vector_size(LANES * 8), aligned(4), may_alias));

// Two words of every lane as (top 23 bits + 0.5) / 2^23, side by side.
HOST_DEVICE FloatLanes uniforms_of(Lanes first, Lanes second) {
  const Lanes bits = low_half(first) >> 9 | low_half(second) >> 9 << 32;
  return (__builtin_convertvector(reinterpret_cast<HalfLanes>(bits), FloatLanes) + 0.5f) * 0x1p-23f;
}

// Lane i of both, side by side, becomes pairs 2 i and 2 i + 1 of memory.
HOST_DEVICE void store_pairs(float* to, FloatLanes first, FloatLanes second) {
  const Lanes a = reinterpret_cast<Lanes>(first), b = reinterpret_cast<Lanes>(second);
#if defined(__AVX512F__)
  const Lanes near = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  const Lanes far = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#elif defined(__AVX2__)
  const Lanes near = __builtin_shufflevector(a, b, 0, 4, 1, 5), far = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#else
  const Lanes near = __builtin_shufflevector(a, b, 0, 2), far = __builtin_shufflevector(a, b, 1, 3);
#endif
  *reinterpret_cast<FloatLanesInMemory*>(to) = reinterpret_cast<FloatLanes>(near);
  *reinterpret_cast<FloatLanesInMemory*>(to + 2 * LANES) = reinterpret_cast<FloatLanes>(far);
}

void INSTRUCTION_SET::uniforms_run(UniformsRow row, const PhiloxKeys& keys, int64_t codebook_size, float* to) {
  for (int64_t code = 0; code < codebook_size; code += 4 * LANES) {
    const Lanes cells = lane_indices() + ((row.position << 16) + code / 4);
    const auto drawn = philox4x32(row.sample & 0xFFFFFFFFu, row.sample >> 32, row.stream, cells, keys);
    const FloatLanes first = uniforms_of(drawn.words[0], drawn.words[1]);
    const FloatLanes second = uniforms_of(drawn.words[2], drawn.words[3]);
    if (codebook_size - code >= 4 * LANES) {
      store_pairs(to + code, first, second);
    } else {
      float last[4 * LANES];
      store_pairs(last, first, second);
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

constexpr int64_t MIN_ELEMENTS_PER_THREAD = 16384, MAX_CODEBOOK_SIZE = int64_t{1} << 18;
constexpr uint32_t PURPOSE = 5;  // SAMPLING of training/philox.py

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
  const Tensor uniforms = torch::stable::new_empty(samples, {num_rows, codebook_size}, ScalarType::Float);
  float* const to = static_cast<float*>(uniforms.data_ptr());
  const PhiloxKeys keys(seed & 0xFFFFFFFF, PURPOSE | static_cast<uint32_t>(seed >> 32) << 8);
  const auto run = BEST_OF(uniforms_run);
  const int64_t grain = std::max<int64_t>(1, MIN_ELEMENTS_PER_THREAD / codebook_size);
  torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const UniformsRow counters{static_cast<uint64_t>(samples_R[row]), static_cast<uint64_t>(positions_R[row]),
                                 static_cast<uint64_t>(streams_R[row])};
      run(counters, keys, codebook_size, to + row * codebook_size);
    }
  });
  return uniforms;
}

STABLE_TORCH_LIBRARY_IMPL(tensorar, CPU, library) {
  library.impl("sampling_uniforms", TORCH_BOX(&sampling_uniforms_cpu));
}

}  // namespace
}  // namespace tensorar

#endif
