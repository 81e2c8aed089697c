// The kernel of cross_entropy_rows as an op on CPU tensors: the same source, blocks and threads in an order that the seed
// determines (0: ascending).
#ifdef IS_BASELINE

#include <torch/csrc/stable/library.h>

#include "cross_entropy_rows_op.h"
#include "run_blocks.h"

namespace tensorar {
namespace {

std::tuple<Tensor, Tensor> cross_entropy_rows(Tensor logits, const Tensor& targets, const Tensor& row_weights,
                                              bool needs_grad, int64_t seed) {
  return cross_entropy_rows_by_body(InOrder{seed}, logits, targets, row_weights, needs_grad);
}

STABLE_TORCH_LIBRARY(tensorar_cross_entropy_bodies, library) {
  library.def(
      "cross_entropy_rows(Tensor(a!) logits, Tensor targets, Tensor row_weights, bool needs_grad, int seed) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tensorar_cross_entropy_bodies, CPU, library) {
  library.impl("cross_entropy_rows", TORCH_BOX(&cross_entropy_rows));
}

}  // namespace
}  // namespace tensorar

#endif
