// tensorar::cross_entropy_rows on CUDA devices.
#include "cross_entropy_rows_op.h"
#include "launch_on_stream.h"

namespace tensorar {
namespace {

std::tuple<Tensor, Tensor> cross_entropy_rows_cuda(Tensor logits, const Tensor& targets, const Tensor& row_weights,
                                                   bool needs_grad) {
  return cross_entropy_rows_by_body(OnStream{}, logits, targets, row_weights, needs_grad);
}

STABLE_TORCH_LIBRARY_IMPL(tensorar, CUDA, library) {
  library.impl("cross_entropy_rows", TORCH_BOX(&cross_entropy_rows_cuda));
}

}  // namespace
}  // namespace tensorar
