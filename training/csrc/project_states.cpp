// tensorar::project_states on the CPU: states times a weight that is too large for any cache, in one pass over it.
//
// A library that packs the weight first moves it twice for a handful of states. Here a few weight rows are read in place
// while the sums of all of a tile's states stay in registers. Each sum has one order, whatever the number of states.
#include "instruction_sets.h"
#include "floats.h"

namespace tensorar {

constexpr int MAX_TILE_STATES = 2 * FLOATS, WEIGHTS_AT_A_TIME = 48;

// Padded with zero states to one or two times FLOATS, dimension after dimension.
struct StatesTile {
  const float* packed;
  int64_t dim;
  int num_states;
};

FOR_EACH_INSTRUCTION_SET(void project_tile(StatesTile tile, const float* weight_VD, int64_t num_weights, float* to,
                                           int64_t to_stride);)

// Weight rows whose sums fit the registers, beside the states.
#if defined(__AVX512F__)
constexpr int WEIGHTS_OF_SUMS = 12;
#elif defined(__AVX2__)
constexpr int WEIGHTS_OF_SUMS = 3;
#else
constexpr int WEIGHTS_OF_SUMS = 1;
#endif

template <int VECTORS, int WEIGHTS>
HOST_DEVICE void project_weights(const float* packed, int64_t dim, const float* weight, float* sums) {
  Floats sum[WEIGHTS][VECTORS] = {};
  for (int64_t d = 0; d < dim; ++d) {
    Floats states[VECTORS];
#pragma GCC unroll 2
    for (int i = 0; i < VECTORS; ++i) states[i] = read(packed + (d * VECTORS + i) * FLOATS);
#pragma GCC unroll 12
    for (int row = 0; row < WEIGHTS; ++row) {
#pragma GCC unroll 2
      for (int i = 0; i < VECTORS; ++i) sum[row][i] += states[i] * weight[row * dim + d];
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < WEIGHTS; ++row) {
#pragma GCC unroll 2
    for (int i = 0; i < VECTORS; ++i) write(sums + (row * VECTORS + i) * FLOATS, sum[row][i]);
  }
}

template <int VECTORS>
HOST_DEVICE void project_by(StatesTile tile, const float* weight_VD, int64_t num_weights, float* to, int64_t to_stride) {
  constexpr int WEIGHTS = WEIGHTS_OF_SUMS * (VECTORS == 1 && WEIGHTS_OF_SUMS < 12 ? 2 : 1), WIDTH = VECTORS * FLOATS;
  float sums[WEIGHTS_AT_A_TIME * WIDTH];
  for (int64_t start = 0; start < num_weights; start += WEIGHTS_AT_A_TIME) {
    const int64_t left = num_weights - start, count = left < WEIGHTS_AT_A_TIME ? left : WEIGHTS_AT_A_TIME;
    int64_t row = 0;
    for (; row + WEIGHTS <= count; row += WEIGHTS) {
      project_weights<VECTORS, WEIGHTS>(tile.packed, tile.dim, weight_VD + (start + row) * tile.dim, sums + row * WIDTH);
    }
    for (; row < count; ++row) {
      project_weights<VECTORS, 1>(tile.packed, tile.dim, weight_VD + (start + row) * tile.dim, sums + row * WIDTH);
    }
    for (int state = 0; state < tile.num_states; ++state) {
      float* const out = to + state * to_stride + start;
      for (int64_t i = 0; i < count; ++i) out[i] = sums[i * WIDTH + state];
    }
  }
}

void INSTRUCTION_SET::project_tile(StatesTile tile, const float* weight_VD, int64_t num_weights, float* to,
                                   int64_t to_stride) {
  if (tile.num_states > FLOATS) {
    project_by<2>(tile, weight_VD, num_weights, to, to_stride);
  } else {
    project_by<1>(tile, weight_VD, num_weights, to, to_stride);
  }
}

}  // namespace tensorar

#ifdef IS_BASELINE

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "check.h"

namespace tensorar {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t MIN_PRODUCTS_PER_THREAD = int64_t{1} << 20;

void check_matrix(const char* name, const Tensor& matrix) {
  check(matrix.dim() == 2 && matrix.is_contiguous() && matrix.scalar_type() == ScalarType::Float && matrix.is_cpu(),
        "project_states: ", name, " must be a contiguous float32 matrix on the CPU");
}

// Tiles of at most MAX_TILE_STATES, one behind the other.
std::vector<float> pack(const float* states_RD, int64_t num_states, int64_t dim) {
  std::vector<float> packed(((num_states + FLOATS - 1) / FLOATS) * FLOATS * dim);
  for (int64_t start = 0; start < num_states; start += MAX_TILE_STATES) {
    const int64_t count = std::min<int64_t>(MAX_TILE_STATES, num_states - start);
    const int64_t width = count > FLOATS ? MAX_TILE_STATES : FLOATS;
    for (int64_t state = 0; state < count; ++state) {
      for (int64_t d = 0; d < dim; ++d) packed[start * dim + d * width + state] = states_RD[(start + state) * dim + d];
    }
  }
  return packed;
}

Tensor project_states_cpu(const Tensor& states, const Tensor& weight) {
  check_matrix("states", states);
  check_matrix("weight", weight);
  const int64_t num_states = states.size(0), dim = states.size(1), num_weights = weight.size(0);
  check(weight.size(1) == dim, "project_states: weight must have D = ", dim, " columns as the states, got ",
        weight.size(1));
  const Tensor projected = torch::stable::new_empty(states, {num_states, num_weights});
  float* const to = static_cast<float*>(projected.data_ptr());
  const float* const weight_VD = static_cast<const float*>(weight.data_ptr());
  const std::vector<float> packed = pack(static_cast<const float*>(states.data_ptr()), num_states, dim);
  const auto project = BEST_OF(project_tile);
  const int64_t num_blocks = (num_weights + WEIGHTS_AT_A_TIME - 1) / WEIGHTS_AT_A_TIME;
  const int64_t products_per_block = std::max<int64_t>(1, num_states * dim * WEIGHTS_AT_A_TIME);
  const int64_t grain = std::max<int64_t>(1, MIN_PRODUCTS_PER_THREAD / products_per_block);
  torch::stable::parallel_for(0, num_blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * WEIGHTS_AT_A_TIME;
      const int64_t count = std::min<int64_t>(WEIGHTS_AT_A_TIME, num_weights - first);
      for (int64_t start = 0; start < num_states; start += MAX_TILE_STATES) {
        const int in_tile = static_cast<int>(std::min<int64_t>(MAX_TILE_STATES, num_states - start));
        project({packed.data() + start * dim, dim, in_tile}, weight_VD + first * dim, count,
                to + start * num_weights + first, num_weights);
      }
    }
  });
  return projected;
}

STABLE_TORCH_LIBRARY_IMPL(tensorar, CPU, library) { library.impl("project_states", TORCH_BOX(&project_states_cpu)); }

}  // namespace
}  // namespace tensorar

#endif
