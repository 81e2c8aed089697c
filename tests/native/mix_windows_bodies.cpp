// The kernels of mix_windows and its backward as ops on CPU tensors: the same source, blocks and threads of each kernel in
// an order that the seed determines (0: ascending).
#ifdef IS_BASELINE

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "mix_windows_by_bodies.h"
#include "run_blocks.h"

namespace tensorar {
namespace {

std::tuple<Tensor, Tensor> mix_windows(const Tensor& codes, const Tensor& table, const Tensor& offsets,
                                       const Tensor& score_weight, int64_t seed) {
  return mix_windows_by_bodies(InOrder{seed}, codes, table, offsets, score_weight);
}

void mix_windows_backward(const Tensor& grad, const Tensor& shares, const Tensor& codes, const Tensor& table,
                          const Tensor& offsets, const Tensor& score_weight, Tensor table_grad, Tensor offset_grads,
                          Tensor score_weight_grad, int64_t seed) {
  mix_windows_backward_by_bodies(InOrder{seed}, grad, shares, codes, table, offsets, score_weight, table_grad, offset_grads,
                                 score_weight_grad);
}

int64_t shared_bytes(const Tensor& codes, const Tensor& table, const Tensor& offsets, const Tensor& score_weight) {
  const auto [mixed, shares] = new_results(codes, table, offsets, score_weight);
  const MixOnGrid op(checked_mix(codes, table, offsets, score_weight, mixed, shares));
  int64_t pairs = 0;
  with_body<MixWindowsBody>(op, [&]<class Body>() { pairs = Body::shared_pairs(op); });
  with_body<MixWindowsBackwardBody>(op, [&]<class Body>() { pairs = std::max<int64_t>(pairs, Body::shared_pairs(op)); });
  return pairs * int64_t{sizeof(Pair)};
}

STABLE_TORCH_LIBRARY(tensorar_mix_bodies, library) {
  library.def(
      "mix_windows(Tensor codes, Tensor table, Tensor offsets, Tensor score_weight, int seed) -> (Tensor, Tensor)");
  library.def(
      "mix_windows_backward(Tensor grad, Tensor shares, Tensor codes, Tensor table, Tensor offsets, Tensor score_weight, "
      "Tensor(a!) table_grad, Tensor(b!) offset_grads, Tensor(c!) score_weight_grad, int seed) -> ()");
  library.def("shared_bytes(Tensor codes, Tensor table, Tensor offsets, Tensor score_weight) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(tensorar_mix_bodies, CPU, library) {
  library.impl("mix_windows", TORCH_BOX(&mix_windows));
  library.impl("mix_windows_backward", TORCH_BOX(&mix_windows_backward));
  library.impl("shared_bytes", TORCH_BOX(&shared_bytes));
}

}  // namespace
}  // namespace tensorar

#endif
