// The arguments of tensorar::mix_windows and its backward; training/mixing.py says what is computed.
//
// M windows, K window_size, D model_dim, N heads, V codebook_size. A code below 0 is not attended to.
#pragma once

#include <stdint.h>

namespace tensorar {

constexpr float NORM_EPS = 1e-5f;

struct MixWindows {
  int64_t num_windows, window_size, heads, dim, codebook_size;
  bool is_bfloat16;
  const int64_t* codes_MK;
  const void* table_VD;
  const float* offsets_KD;
  const float* score_weight_ND;
  void* mixed_MND;  // in backward its gradient
  float* shares_MNK;
  float* table_grad_VD;
};

}  // namespace tensorar
