// The schemas of the ops; what they compute is documented at their Python functions in training/ops.py.
//
// Torch's stable ABI: no Python headers, and one binary serves torch 2.10 and newer. The kernels register themselves.
#ifdef IS_BASELINE

#include <torch/csrc/stable/library.h>

// training/ops.py looks for this text in the library's bytes, to tell whether it was built from these sources.
extern "C" __attribute__((used, visibility("default"))) const char tensorar_ops_sources[] = OPS_SOURCES;

STABLE_TORCH_LIBRARY(tensorar, library) {
  library.def(
      "noise_windows(Tensor codes, Tensor sample_counters, int[] thresholds, int codebook_size, str coupling, "
      "int seed, int step) -> Tensor");
  library.def(
      "sampling_uniforms(Tensor samples, Tensor positions, Tensor streams, int codebook_size, int seed) -> Tensor");
  library.def(
      "drawn_codes(Tensor logits, Tensor rows, Tensor samples, Tensor positions, Tensor streams, int seed) -> "
      "(Tensor, Tensor)");
  library.def("project_states(Tensor states, Tensor weight) -> Tensor");
  library.def("mix_windows(Tensor codes, Tensor table, Tensor offsets, Tensor score_weight) -> (Tensor, Tensor)");
  library.def(
      "mix_windows_backward(Tensor grad, Tensor shares, Tensor codes, Tensor table, Tensor offsets, Tensor score_weight, "
      "Tensor(a!) table_grad, Tensor(b!) offset_grads, Tensor(c!) score_weight_grad) -> ()");
  library.def(
      "cross_entropy_rows(Tensor(a!) logits, Tensor targets, Tensor row_weights, bool needs_grad) -> (Tensor, Tensor)");
}

#endif
