// tensorar::mix_windows and its backward as a series of kernels: on a CUDA stream, or on the CPU where tests run them.
//
// `launch.template run<Body>(arguments, tensor)` runs a body's whole grid on the device of the tensor.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <tuple>

#include "mix_windows_backward_body.h"
#include "mix_windows_body.h"
#include "mix_windows_op.h"
#include "sum_bodies.h"

namespace tensorar {

template <class... Pointers>
bool are_aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % sizeof(Pair) == 0) && ...);
}

// Calls run with a body of the table's dtype, for aligned rows where they are.
template <template <class, class> class Body, class Run>
void with_body(const MixWindows& op, Run run) {
  const bool is_aligned = op.dim % (op.is_bfloat16 ? COLUMNS<BFloat16> : COLUMNS<float>) == 0 &&
                          are_aligned(op.table_VD, op.offsets_KD, op.score_weight_ND, op.mixed_MND);
  if (op.is_bfloat16)
    is_aligned ? run.template operator()<Body<BFloat16, Aligned>>() : run.template operator()<Body<BFloat16, Unaligned>>();
  else
    is_aligned ? run.template operator()<Body<float, Aligned>>() : run.template operator()<Body<float, Unaligned>>();
}

template <class Launch>
std::tuple<Tensor, Tensor> mix_windows_by_bodies(Launch launch, const Tensor& codes, const Tensor& table,
                                                 const Tensor& offsets, const Tensor& score_weight) {
  const auto [mixed, shares] = new_results(codes, table, offsets, score_weight);
  const MixOnGrid op(checked_mix(codes, table, offsets, score_weight, mixed, shares));
  const Tensor& on = mixed;
  with_body<MixWindowsBody>(op, [&]<class Body>() { launch.template run<Body>(op, on); });
  return {mixed, shares};
}

// Adds the sum of the first dimension of `parts` to `to`.
template <class Launch>
void add_parts(Launch launch, const Tensor& parts, const Tensor& to) {
  const SumParts sum{static_cast<const float*>(parts.data_ptr()), static_cast<float*>(to.data_ptr()), parts.size(0),
                     to.numel()};
  if (sum.num_elements % COLUMNS<float> == 0 && are_aligned(sum.parts_PE, sum.to_E))
    launch.template run<SumPartsBody<Aligned>>(sum, to);
  else
    launch.template run<SumPartsBody<Unaligned>>(sum, to);
}

// Sorted, and where each was; equal ones stay in their order.
inline std::tuple<Tensor, Tensor> sorted(const Tensor& codes) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(codes), from(std::optional<bool>(true)), from(int64_t{0}), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// Adds the rows' gradients to the table's.
template <class Launch>
void add_rows(Launch launch, const Tensor& codes, const Tensor& rows, const Tensor& table_grad) {
  const auto [in_order, places] = sorted(torch::stable::flatten(codes));
  const AddRows op{static_cast<const int64_t*>(in_order.data_ptr()), static_cast<const int64_t*>(places.data_ptr()),
                   static_cast<const float*>(rows.data_ptr()),       static_cast<float*>(table_grad.data_ptr()),
                   codes.numel(),                                    table_grad.size(1)};
  if (op.dim % COLUMNS<float> == 0 && are_aligned(op.rows_RD, op.table_VD))
    launch.template run<AddRowsBody<Aligned>>(op, table_grad);
  else
    launch.template run<AddRowsBody<Unaligned>>(op, table_grad);
}

template <class Launch>
void mix_windows_backward_by_bodies(Launch launch, const Tensor& grad, const Tensor& shares, const Tensor& codes,
                                    const Tensor& table, const Tensor& offsets, const Tensor& score_weight,
                                    const Tensor& table_grad, const Tensor& offset_grads, const Tensor& score_weight_grad) {
  MixOnGrid op(checked_mix(codes, table, offsets, score_weight, grad, shares));
  check_grads(table, offsets, score_weight, table_grad, offset_grads, score_weight_grad);
  if (op.num_windows == 0) return;
  const int64_t windows = op.num_windows, size = op.window_size, heads = op.heads, dim = op.dim;
  const auto floats = [&](std::initializer_list<int64_t> shape) { return torch::stable::new_empty(offsets, shape); };
  const Tensor rows = floats({windows * size, dim}), key_shares = floats({windows, size, op.plan.padded_heads});
  op.row_grads_MKD = static_cast<float*>(rows.data_ptr());
  op.key_shares_MKN = static_cast<float*>(key_shares.data_ptr());
  with_body<MixWindowsBackwardBody>(op, [&]<class Body>() {
    const Tensor sums = floats({Body::num_blocks(op), size, dim});
    op.offset_sums_PKD = static_cast<float*>(sums.data_ptr());
    launch.template run<Body>(op, sums);
    add_parts(launch, sums, offset_grads);
  });
  with_body<ScoreWeightGradBody>(op, [&]<class Body>() {
    const Tensor sums = floats({Body::num_groups(op), heads, dim});
    op.weight_sums_GND = static_cast<float*>(sums.data_ptr());
    launch.template run<Body>(op, sums);
    add_parts(launch, sums, score_weight_grad);
  });
  add_rows(launch, codes, rows, table_grad);
}

}  // namespace tensorar
