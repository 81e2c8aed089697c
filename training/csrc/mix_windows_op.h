// What the host sides of tensorar::mix_windows share: checks, results, the arguments of the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "check.h"
#include "mix_windows_arguments.h"

namespace tensorar {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_matrix(const char* name, const Tensor& matrix, ScalarType type, const char* rule, int64_t rows, int64_t columns) {
  check(matrix.dim() == 2 && matrix.size(0) == rows && matrix.size(1) == columns && matrix.scalar_type() == type &&
            matrix.is_contiguous(),
        "mix_windows: ", name, " must be contiguous, ", rule, ", of shape (", rows, ", ", columns, ")");
}

inline std::tuple<Tensor, Tensor> new_results(const Tensor& codes, const Tensor& table, const Tensor& offsets,
                                              const Tensor& score_weight) {
  check(codes.dim() == 2 && table.dim() == 2 && score_weight.dim() == 2,
        "mix_windows: codes (M, K), table (V, D) and score_weight (N, D) must have 2 dimensions, got ", codes.dim(), ", ",
        table.dim(), " and ", score_weight.dim());
  const int64_t windows = codes.size(0), heads = score_weight.size(0);
  return {torch::stable::new_empty(table, {windows, heads, table.size(1)}),
          torch::stable::new_empty(offsets, {windows, heads, codes.size(1)})};
}

// Raises where an argument is not what the kernels read; `mixed` may be its gradient.
inline MixWindows checked_mix(const Tensor& codes, const Tensor& table, const Tensor& offsets, const Tensor& score_weight,
                              const Tensor& mixed, const Tensor& shares) {
  const bool is_bfloat16 = table.scalar_type() == ScalarType::BFloat16;
  check(is_bfloat16 || table.scalar_type() == ScalarType::Float,
        "mix_windows: table must be float32 or bfloat16; call the reference for other dtypes");
  const int64_t windows = codes.size(0), size = codes.size(1), heads = score_weight.size(0), dim = table.size(1);
  check(size >= 1 && heads >= 1 && dim >= 1 && table.size(0) >= 1, "mix_windows: window_size, heads, dim and codes must be positive");
  check_matrix("codes", codes, ScalarType::Long, "int64", windows, size);
  check_matrix("table", table, table.scalar_type(), "float", table.size(0), dim);
  check_matrix("offsets", offsets, ScalarType::Float, "float32", size, dim);
  check_matrix("score_weight", score_weight, ScalarType::Float, "float32", heads, dim);
  check(mixed.dim() == 3 && mixed.size(0) == windows && mixed.size(1) == heads && mixed.size(2) == dim &&
            mixed.scalar_type() == table.scalar_type() && mixed.is_contiguous(),
        "mix_windows: grad must be contiguous, of the table's dtype and of shape (", windows, ", ", heads, ", ", dim, ")");
  check(shares.dim() == 3 && shares.size(0) == windows && shares.size(1) == heads && shares.size(2) == size &&
            shares.scalar_type() == ScalarType::Float && shares.is_contiguous(),
        "mix_windows: shares must be contiguous, float32, of shape (", windows, ", ", heads, ", ", size, ")");
  for (const Tensor* other : {&codes, &offsets, &score_weight, &mixed, &shares})
    check(other->is_cuda() == table.is_cuda() && other->get_device() == table.get_device(),
          "mix_windows: all tensors must be on the device of table");
  MixWindows op{};
  op.num_windows = windows;
  op.window_size = size;
  op.heads = heads;
  op.dim = dim;
  op.codebook_size = table.size(0);
  op.is_bfloat16 = is_bfloat16;
  op.codes_MK = static_cast<const int64_t*>(codes.data_ptr());
  op.table_VD = table.data_ptr();
  op.offsets_KD = static_cast<const float*>(offsets.data_ptr());
  op.score_weight_ND = static_cast<const float*>(score_weight.data_ptr());
  op.mixed_MND = mixed.data_ptr();
  op.shares_MNK = static_cast<float*>(shares.data_ptr());
  return op;
}

inline void check_grads(const Tensor& table, const Tensor& offsets, const Tensor& score_weight, const Tensor& table_grad,
                        const Tensor& offset_grads, const Tensor& score_weight_grad) {
  check_matrix("table_grad", table_grad, ScalarType::Float, "float32", table.size(0), table.size(1));
  check_matrix("offset_grads", offset_grads, ScalarType::Float, "float32", offsets.size(0), offsets.size(1));
  check_matrix("score_weight_grad", score_weight_grad, ScalarType::Float, "float32", score_weight.size(0), score_weight.size(1));
  for (const Tensor* grad : {&table_grad, &offset_grads, &score_weight_grad})
    check(grad->is_cuda() == table.is_cuda() && grad->get_device() == table.get_device(),
          "mix_windows: all gradients must be on the device of table");
}

}  // namespace tensorar
