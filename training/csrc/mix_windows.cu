// tensorar::mix_windows and its backward on CUDA devices.
#include "launch_on_stream.h"
#include "mix_windows_by_bodies.h"

namespace tensorar {
namespace {

std::tuple<Tensor, Tensor> mix_windows_cuda(const Tensor& codes, const Tensor& table, const Tensor& offsets,
                                            const Tensor& score_weight) {
  return mix_windows_by_bodies(OnStream{}, codes, table, offsets, score_weight);
}

void mix_windows_backward_cuda(const Tensor& grad, const Tensor& shares, const Tensor& codes, const Tensor& table,
                               const Tensor& offsets, const Tensor& score_weight, Tensor table_grad, Tensor offset_grads,
                               Tensor score_weight_grad) {
  mix_windows_backward_by_bodies(OnStream{}, grad, shares, codes, table, offsets, score_weight, table_grad, offset_grads,
                                 score_weight_grad);
}

STABLE_TORCH_LIBRARY_IMPL(tensorar, CUDA, library) {
  library.impl("mix_windows", TORCH_BOX(&mix_windows_cuda));
  library.impl("mix_windows_backward", TORCH_BOX(&mix_windows_backward_cuda));
}

}  // namespace
}  // namespace tensorar
