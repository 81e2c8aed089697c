// tensorar::project_states on the CPU: states times a weight that is too large for any cache, in one pass over it.
//
// A library that packs the weight first moves it twice for a handful of states. Here a few weight rows are read in place
// while the sums of all of a tile's states stay in registers. Each sum has one order, whatever the number of states.
#include "instruction_sets.h"
#include "lanes.h"

namespace tensorar {

constexpr int SMALL_TILE = 16, LARGE_TILE = 32, WEIGHTS_AT_A_TIME = 48;

// States, dimension after dimension, padded with zeros to one of the two widths.
struct StatesTile {
  const float* packed;
  int64_t dim;
  int num_states;
};

FOR_EACH_INSTRUCTION_SET(void project_tile(StatesTile tile, const float* weight_VD, int64_t num_weights, float* to,
                                           int64_t to_stride);)

constexpr int VECTOR = 2 * LANES;
typedef float Vector __attribute__((vector_size(LANES * 8)));
typedef float VectorInMemory __attribute__((vector_size(LANES * 8), aligned(4), may_alias));

// Weight rows whose sums, of two vectors of states each, fit the registers.
#if defined(__AVX512F__)
constexpr int WEIGHTS_IN_REGISTERS = 12;
#else
constexpr int WEIGHTS_IN_REGISTERS = 6;
#endif

// Sums of some vectors of a tile's states with some weight rows, rows of `WIDTH` in `sums` as in the tile.
template <int WIDTH, int VECTORS, int WEIGHTS>
HOST_DEVICE void project_weights(const float* packed, int64_t dim, const float* weight, float* sums) {
  Vector sum[WEIGHTS][VECTORS] = {};
  for (int64_t d = 0; d < dim; ++d) {
    Vector states[VECTORS];
#pragma GCC unroll 2
    for (int i = 0; i < VECTORS; ++i) {
      states[i] = *reinterpret_cast<const VectorInMemory*>(packed + d * WIDTH + i * VECTOR);
    }
#pragma GCC unroll 12
    for (int row = 0; row < WEIGHTS; ++row) {
#pragma GCC unroll 2
      for (int i = 0; i < VECTORS; ++i) sum[row][i] += states[i] * weight[row * dim + d];
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < WEIGHTS; ++row) {
#pragma GCC unroll 2
    for (int i = 0; i < VECTORS; ++i) *reinterpret_cast<VectorInMemory*>(sums + row * WIDTH + i * VECTOR) = sum[row][i];
  }
}

template <int WIDTH>
HOST_DEVICE void project_to_width(StatesTile tile, const float* weight_VD, int64_t num_weights, float* to,
                                  int64_t to_stride) {
  constexpr int VECTORS = WIDTH >= 2 * VECTOR ? 2 : 1;
  float sums[WEIGHTS_AT_A_TIME * WIDTH];
  for (int64_t start = 0; start < num_weights; start += WEIGHTS_AT_A_TIME) {
    const int64_t left = num_weights - start, count = left < WEIGHTS_AT_A_TIME ? left : WEIGHTS_AT_A_TIME;
    for (int64_t row = 0; row < count;) {
      const bool is_full = count - row >= WEIGHTS_IN_REGISTERS;
      const float* const weight = weight_VD + (start + row) * tile.dim;
      for (int column = 0; column < WIDTH; column += VECTORS * VECTOR) {
        float* const of_row = sums + row * WIDTH + column;
        if (is_full) {
          project_weights<WIDTH, VECTORS, WEIGHTS_IN_REGISTERS>(tile.packed + column, tile.dim, weight, of_row);
        } else {
          project_weights<WIDTH, VECTORS, 1>(tile.packed + column, tile.dim, weight, of_row);
        }
      }
      row += is_full ? WEIGHTS_IN_REGISTERS : 1;
    }
    for (int state = 0; state < tile.num_states; ++state) {
      float* const out = to + state * to_stride + start;
      for (int64_t i = 0; i < count; ++i) out[i] = sums[i * WIDTH + state];
    }
  }
}

void INSTRUCTION_SET::project_tile(StatesTile tile, const float* weight_VD, int64_t num_weights, float* to,
                                   int64_t to_stride) {
  if (tile.num_states > SMALL_TILE) {
    project_to_width<LARGE_TILE>(tile, weight_VD, num_weights, to, to_stride);
  } else {
    project_to_width<SMALL_TILE>(tile, weight_VD, num_weights, to, to_stride);
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

// Tiles of at most LARGE_TILE, one behind the other.
std::vector<float> pack(const float* states_RD, int64_t num_states, int64_t dim) {
  std::vector<float> packed((num_states + SMALL_TILE - 1) / SMALL_TILE * SMALL_TILE * dim);
  for (int64_t start = 0; start < num_states; start += LARGE_TILE) {
    const int64_t count = std::min<int64_t>(LARGE_TILE, num_states - start);
    const int64_t width = count > SMALL_TILE ? LARGE_TILE : SMALL_TILE;
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
      for (int64_t start = 0; start < num_states; start += LARGE_TILE) {
        const int in_tile = static_cast<int>(std::min<int64_t>(LARGE_TILE, num_states - start));
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
