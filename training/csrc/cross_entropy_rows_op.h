// What runs tensorar::cross_entropy_rows: checks and results; on a CUDA stream, or on the CPU where tests run it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "check.h"
#include "cross_entropy_rows.h"

namespace tensorar {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_of_rows(const char* name, const Tensor& values, ScalarType type, const char* rule, const Tensor& logits) {
  check(values.dim() == 1 && values.size(0) == logits.size(0) && values.scalar_type() == type && values.is_contiguous() &&
            values.is_cuda() == logits.is_cuda() && values.get_device() == logits.get_device(),
        "cross_entropy_rows: ", name, " must be contiguous ", rule, " of shape (", logits.size(0), ",) on the device of logits");
}

template <class T, class Launch>
void launch_rows(Launch launch, const CrossEntropyRows& op, const Tensor& on) {
  if (op.codebook_size % COLUMNS<T> == 0 && reinterpret_cast<uintptr_t>(op.logits_RV) % sizeof(Pair) == 0)
    launch.template run<CrossEntropyRowsBody<T, Aligned>>(op, on);
  else
    launch.template run<CrossEntropyRowsBody<T, Unaligned>>(op, on);
}

// Entropies and hits; the logits become their gradient where it is needed.
template <class Launch>
std::tuple<Tensor, Tensor> cross_entropy_rows_by_body(Launch launch, const Tensor& logits, const Tensor& targets,
                                                      const Tensor& row_weights, bool needs_grad) {
  const bool is_bfloat16 = logits.scalar_type() == ScalarType::BFloat16;
  check(logits.dim() == 2 && logits.is_contiguous() && (is_bfloat16 || logits.scalar_type() == ScalarType::Float),
        "cross_entropy_rows: logits must be contiguous float32 or bfloat16 of shape (R, V)");
  check(logits.size(1) >= 1 && logits.size(1) < int64_t{1} << 31,
        "cross_entropy_rows: codebook_size must be in [1, 2**31), got ", logits.size(1));
  check_of_rows("targets", targets, ScalarType::Long, "int64", logits);
  check_of_rows("row_weights", row_weights, ScalarType::Float, "float32", logits);
  const Tensor entropies = torch::stable::new_empty(row_weights, {logits.size(0)});
  const Tensor hits = torch::stable::new_empty(row_weights, {logits.size(0)}, ScalarType::Bool);
  CrossEntropyRows op{};
  op.num_rows = logits.size(0);
  op.codebook_size = logits.size(1);
  op.is_bfloat16 = is_bfloat16;
  op.needs_grad = needs_grad;
  op.logits_RV = logits.data_ptr();
  op.targets_R = static_cast<const int64_t*>(targets.data_ptr());
  op.row_weights_R = static_cast<const float*>(row_weights.data_ptr());
  op.entropies_R = static_cast<float*>(entropies.data_ptr());
  op.hits_R = static_cast<bool*>(hits.data_ptr());
  is_bfloat16 ? launch_rows<BFloat16>(launch, op, logits) : launch_rows<float>(launch, op, logits);
  return {entropies, hits};
}

}  // namespace tensorar
