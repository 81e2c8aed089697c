// tensorar::mix_windows and its backward on the CPU: a block of windows a thread, their keys in cache.
#include "mix_windows.h"

#include "instruction_sets.h"

namespace tensorar {

FOR_EACH_INSTRUCTION_SET(
    void mix_some(const MixInBlocks& op, int64_t first, int64_t last, float* scratch);
    void mix_some_backward(const MixInBlocks& op, int64_t first, int64_t last, float* row_grads, float* offset_grads,
                           float* score_weight_grad, float* scratch);
    void add_rows(const MixInBlocks& op, const float* row_grads, int64_t first, int64_t last, int64_t part, int64_t parts);)

void INSTRUCTION_SET::mix_some(const MixInBlocks& op, int64_t first, int64_t last, float* scratch) {
  op.is_bfloat16 ? mix_block<BFloat16>(op, first, last, scratch) : mix_block<float>(op, first, last, scratch);
}

void INSTRUCTION_SET::mix_some_backward(const MixInBlocks& op, int64_t first, int64_t last, float* row_grads,
                                        float* offset_grads, float* score_weight_grad, float* scratch) {
  if (op.is_bfloat16)
    mix_block_backward<BFloat16>(op, first, last, row_grads, offset_grads, score_weight_grad, scratch);
  else
    mix_block_backward<float>(op, first, last, row_grads, offset_grads, score_weight_grad, scratch);
}

void INSTRUCTION_SET::add_rows(const MixInBlocks& op, const float* row_grads, int64_t first, int64_t last, int64_t part,
                               int64_t parts) {
  add_part_of_rows(op, row_grads, first, last, part, parts);
}

}  // namespace tensorar

#ifdef IS_BASELINE

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "mix_windows_op.h"

namespace tensorar {
namespace {

// Windows whose rows' gradients wait together for the table's: enough blocks for many threads, few enough for the cache.
constexpr int64_t SLAB_WINDOWS = 256;
// From here on a result is written past the caches: nobody finds it there afterwards.
constexpr int64_t PAST_CACHE_BYTES = 32 << 20;

// The float rows of a small tensor, padded with zeros to whole vectors.
std::vector<float> padded_rows(const Tensor& rows, int64_t padded) {
  const int64_t columns = rows.size(1);
  std::vector<float> copy(rows.size(0) * padded);
  for (int64_t i = 0; i < rows.size(0); ++i)
    std::copy_n(static_cast<const float*>(rows.data_ptr()) + i * columns, columns, copy.data() + i * padded);
  return copy;
}

// Adds the first columns of padded rows to `to`.
void add_unpadded(const float* from, int64_t padded, const Tensor& to) {
  const int64_t rows = to.size(0), columns = to.size(1);
  float* sums = static_cast<float*>(to.data_ptr());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < columns; ++d) sums[i * columns + d] += from[i * padded + d];
}

void check_codes(const MixInBlocks& op) {
  const int64_t* end = op.codes_MK + op.num_windows * op.window_size;
  const int64_t largest = op.num_windows == 0 ? 0 : *std::max_element(op.codes_MK, end);
  check(largest < op.codebook_size, "mix_windows: codes must be below the table's ", op.codebook_size, " rows, got ", largest);
}

int64_t num_blocks(int64_t windows) { return (windows + BLOCK_WINDOWS - 1) / BLOCK_WINDOWS; }

std::tuple<Tensor, Tensor> mix_windows_cpu(const Tensor& codes, const Tensor& table, const Tensor& offsets,
                                           const Tensor& score_weight) {
  const auto [mixed, shares] = new_results(codes, table, offsets, score_weight);
  MixInBlocks op{checked_mix(codes, table, offsets, score_weight, mixed, shares), false};
  check_codes(op);
  const std::vector<float> offsets_KD = padded_rows(offsets, op.padded()), weight_ND = padded_rows(score_weight, op.padded());
  op.offsets_KD = offsets_KD.data(), op.score_weight_ND = weight_ND.data();
  const bool is_large = op.num_windows * op.heads * op.dim * sizeof(float) >= PAST_CACHE_BYTES;
  op.is_past_cache = is_large && !op.is_bfloat16 && op.dim % FLOATS == 0 && reinterpret_cast<uintptr_t>(op.mixed_MND) % 64 == 0;
  torch::stable::parallel_for(0, num_blocks(op.num_windows), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(mix_scratch(op));
    const int64_t first = begin * BLOCK_WINDOWS, last = std::min(op.num_windows, end * BLOCK_WINDOWS);
    BEST_OF(mix_some)(op, first, last, scratch.data());
  });
  return {mixed, shares};
}

void mix_windows_backward_cpu(const Tensor& grad, const Tensor& shares, const Tensor& codes, const Tensor& table,
                              const Tensor& offsets, const Tensor& score_weight, Tensor table_grad, Tensor offset_grads,
                              Tensor score_weight_grad) {
  MixInBlocks op{checked_mix(codes, table, offsets, score_weight, grad, shares), false};
  check_codes(op);
  check_grads(table, offsets, score_weight, table_grad, offset_grads, score_weight_grad);
  const int64_t padded = op.padded(), size = op.window_size, of_offsets = size * padded, of_weight = op.heads * padded;
  const std::vector<float> offsets_KD = padded_rows(offsets, padded), weight_ND = padded_rows(score_weight, padded);
  op.offsets_KD = offsets_KD.data(), op.score_weight_ND = weight_ND.data();
  op.table_grad_VD = static_cast<float*>(table_grad.data_ptr());
  const int64_t slab = std::min(SLAB_WINDOWS, op.num_windows), parts = torch::stable::get_num_threads();
  const std::unique_ptr<float[]> row_grads(new float[slab * of_offsets]);
  std::vector<float> sums(num_blocks(slab) * (of_offsets + of_weight));
  for (int64_t start = 0; start < op.num_windows; start += slab) {
    const int64_t stop = std::min(op.num_windows, start + slab), blocks = num_blocks(stop - start);
    std::fill(sums.begin(), sums.end(), 0.0f);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(mix_scratch(op));
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = start + block * BLOCK_WINDOWS;
        float* block_sums = sums.data() + block * (of_offsets + of_weight);
        BEST_OF(mix_some_backward)(op, first, std::min(stop, first + BLOCK_WINDOWS),
                                   row_grads.get() + (first - start) * of_offsets, block_sums, block_sums + of_offsets,
                                   scratch.data());
      }
    });
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) BEST_OF(add_rows)(op, row_grads.get(), start, stop, part, parts);
    });
    for (int64_t block = 0; block < blocks; ++block) {
      const float* block_sums = sums.data() + block * (of_offsets + of_weight);
      add_unpadded(block_sums, padded, offset_grads);
      add_unpadded(block_sums + of_offsets, padded, score_weight_grad);
    }
  }
}

STABLE_TORCH_LIBRARY_IMPL(tensorar, CPU, library) {
  library.impl("mix_windows", TORCH_BOX(&mix_windows_cpu));
  library.impl("mix_windows_backward", TORCH_BOX(&mix_windows_backward_cpu));
}

}  // namespace
}  // namespace tensorar

#endif
