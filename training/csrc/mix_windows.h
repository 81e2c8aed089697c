// The windows' keys, weighed and summed per head, and the way back; training/mixing.py says what is computed.
//
// A window's K keys live in cache between the steps; nothing of them is kept. Every sum has one order whatever the number
// of threads: windows are dealt out in blocks of a fixed size, and a row of the table's gradient belongs to one thread.
//
// M windows, K window_size, D model_dim, N heads, V codebook_size. A code below 0 is not attended to.
#pragma once

#include <math.h>

#include "floats.h"
#include "mix_windows_arguments.h"

namespace tensorar {

constexpr int64_t BLOCK_WINDOWS = 32;  // that one thread takes at a time
constexpr int64_t GROUP_WINDOWS = 4;   // whose keys are in cache together in backward

struct MixInBlocks : MixWindows {
  bool is_past_cache;  // mixed_MND is large, and whole vectors of it are aligned
  // Length of the rows of offsets_KD and score_weight_ND, which are padded to whole vectors.
  HOST_DEVICE int64_t padded() const { return (dim + FLOATS - 1) / FLOATS * FLOATS; }
};

// Asks for the rows of a window's codes, so that they are in cache when their turn comes.
template <class T>
HOST_DEVICE void ask_for_rows(const MixInBlocks& op, const int64_t* codes_K, const T* table_VD) {
  for (int64_t k = 0; k < op.window_size; ++k)
    if (codes_K[k] >= 0)
      for (int64_t d = 0; d < op.dim; d += 64 / sizeof(T)) __builtin_prefetch(table_VD + codes_K[k] * op.dim + d);
}

// Keys of one window, normalised: keys_KD, and the factor of each.
template <class T>
HOST_DEVICE void make_keys(const MixInBlocks& op, const int64_t* codes_K, const T* table_VD, float* keys_KD, float* factors_K) {
  const int64_t padded = op.padded();
  for (int64_t k = 0; k < op.window_size; ++k) {
    float* key_D = keys_KD + k * padded;
    const bool is_valid = codes_K[k] >= 0;
    const T* row_D = table_VD + (is_valid ? codes_K[k] : 0) * op.dim;
    Floats squares = {}, more_squares = {};
    int64_t d = 0;
    for (; d + 2 * FLOATS <= op.dim; d += 2 * FLOATS) {
      const Floats x = read(row_D + d) + read(op.offsets_KD + k * padded + d);
      const Floats y = read(row_D + d + FLOATS) + read(op.offsets_KD + k * padded + d + FLOATS);
      write(key_D + d, x);
      write(key_D + d + FLOATS, y);
      squares += x * x;
      more_squares += y * y;
    }
    for (; d < op.dim; d += FLOATS) {
      const Floats x = read(row_D + d, op.dim - d) + read(op.offsets_KD + k * padded + d);
      write(key_D + d, x);
      squares += x * x;
    }
    factors_K[k] = is_valid ? 1.0f / __builtin_sqrtf(sum(squares + more_squares) / op.dim + NORM_EPS) : 0.0f;
    const Floats factor = spread(factors_K[k]);
    for (d = 0; d < padded; d += FLOATS) write(key_D + d, read(key_D + d) * factor);
  }
}

// Adds 16 columns of `Heads` rows times `Keys` keys.
template <int Heads, int Keys, class T>
HOST_DEVICE void add_products(const T* rows_ND, int64_t row_stride, const float* keys_KD, int64_t key_stride, int64_t count,
                                  Floats (&sums)[Heads][Keys]) {
  Floats keys[Keys];
#pragma GCC unroll 8
  for (int k = 0; k < Keys; ++k) keys[k] = read(keys_KD + k * key_stride);
#pragma GCC unroll 8
  for (int n = 0; n < Heads; ++n) {
    const Floats row = count == FLOATS ? read(rows_ND + n * row_stride) : read(rows_ND + n * row_stride, count);
#pragma GCC unroll 8
    for (int k = 0; k < Keys; ++k) sums[n][k] += row * keys[k];
  }
}

// dots[n * size + k] = rows_ND[n] . keys_KD[k] of `Heads` rows and `Keys` keys, all in registers.
template <int Heads, int Keys, class T>
HOST_DEVICE void dot_tile(const MixInBlocks& op, const T* rows_ND, int64_t row_stride, const float* keys_KD, float* dots) {
  const int64_t padded = op.padded();
  Floats sums[Heads][Keys] = {};
  int64_t d = 0;
  for (; d + FLOATS <= row_stride; d += FLOATS)
    add_products<Heads, Keys>(rows_ND + d, row_stride, keys_KD + d, padded, FLOATS, sums);
  if (d < row_stride) add_products<Heads, Keys>(rows_ND + d, row_stride, keys_KD + d, padded, row_stride - d, sums);
#pragma GCC unroll 8
  for (int n = 0; n < Heads; ++n)
#pragma GCC unroll 8
    for (int k = 0; k < Keys; ++k) dots[n * op.window_size + k] = sum(sums[n][k]);
}

template <int Heads, class T>
HOST_DEVICE void dots_of_heads(const MixInBlocks& op, const T* rows_ND, int64_t row_stride, const float* keys_KD, float* dots) {
  int64_t k = 0;
  for (; k + 4 <= op.window_size; k += 4) dot_tile<Heads, 4>(op, rows_ND, row_stride, keys_KD + k * op.padded(), dots + k);
  for (; k + 2 <= op.window_size; k += 2) dot_tile<Heads, 2>(op, rows_ND, row_stride, keys_KD + k * op.padded(), dots + k);
  for (; k < op.window_size; ++k) dot_tile<Heads, 1>(op, rows_ND, row_stride, keys_KD + k * op.padded(), dots + k);
}

// dots_NK of N rows of `row_stride` numbers with K keys.
template <class T>
HOST_DEVICE void all_dots(const MixInBlocks& op, const T* rows_ND, int64_t row_stride, const float* keys_KD, float* dots_NK) {
  int64_t n = 0;
  for (; n + 4 <= op.heads; n += 4)
    dots_of_heads<4>(op, rows_ND + n * row_stride, row_stride, keys_KD, dots_NK + n * op.window_size);
  for (; n < op.heads; ++n)
    dots_of_heads<1>(op, rows_ND + n * row_stride, row_stride, keys_KD, dots_NK + n * op.window_size);
}

HOST_DEVICE void softmax(const MixInBlocks& op, const int64_t* codes_K, float* scores_NK) {
  for (int64_t n = 0; n < op.heads; ++n) {
    float* row_K = scores_NK + n * op.window_size;
    float largest = -__builtin_inff(), total = 0;
    for (int64_t k = 0; k < op.window_size; ++k)
      if (codes_K[k] >= 0 && !(row_K[k] <= largest)) largest = row_K[k];
    for (int64_t k = 0; k < op.window_size; ++k) {
      row_K[k] = codes_K[k] >= 0 ? expf(row_K[k] - largest) : 0.0f;
      total += row_K[k];
    }
    for (int64_t k = 0; k < op.window_size; ++k) row_K[k] /= total;
  }
}

// Heads `Heads` at a time: their rows may lie a multiple of 4 KiB apart, where a cache holds few lines of the same columns.
template <int Heads, int Keys, class T>
HOST_DEVICE void mix_columns(const MixInBlocks& op, const float* shares_NK, const float* keys_KD, T* mixed_ND, int64_t count) {
  Floats keys[Keys];
#pragma GCC unroll 8
  for (int k = 0; k < Keys; ++k) keys[k] = read(keys_KD + k * op.padded());
#pragma GCC unroll 8
  for (int n = 0; n < Heads; ++n) {
    Floats mixed = shares_NK[n * op.window_size] * keys[0];
#pragma GCC unroll 8
    for (int k = 1; k < Keys; ++k) mixed += shares_NK[n * op.window_size + k] * keys[k];
    if (op.is_past_cache) write_past_cache(mixed_ND + n * op.dim, mixed);
    else if (count == FLOATS) write(mixed_ND + n * op.dim, mixed);
    else write(mixed_ND + n * op.dim, mixed, count);
  }
}

template <int Heads, int Keys, class T>
HOST_DEVICE void mix_tile(const MixInBlocks& op, const float* shares_NK, const float* keys_KD, T* mixed_ND) {
  int64_t d = 0;
  for (; d + FLOATS <= op.dim; d += FLOATS) mix_columns<Heads, Keys>(op, shares_NK, keys_KD + d, mixed_ND + d, FLOATS);
  if (d < op.dim) mix_columns<Heads, Keys>(op, shares_NK, keys_KD + d, mixed_ND + d, op.dim - d);
}

template <int Keys, class T>
HOST_DEVICE void mix_heads(const MixInBlocks& op, const float* shares_NK, const float* keys_KD, T* mixed_ND) {
  int64_t n = 0;
  for (; n + 4 <= op.heads; n += 4)
    mix_tile<4, Keys>(op, shares_NK + n * op.window_size, keys_KD, mixed_ND + n * op.dim);
  for (; n < op.heads; ++n) mix_tile<1, Keys>(op, shares_NK + n * op.window_size, keys_KD, mixed_ND + n * op.dim);
}

template <class T>
HOST_DEVICE void mix(const MixInBlocks& op, const float* shares_NK, const float* keys_KD, T* mixed_ND) {
  if (op.window_size == 2) return mix_heads<2>(op, shares_NK, keys_KD, mixed_ND);
  if (op.window_size == 4) return mix_heads<4>(op, shares_NK, keys_KD, mixed_ND);
  if (op.window_size == 8) return mix_heads<8>(op, shares_NK, keys_KD, mixed_ND);
  for (int64_t d = 0; d < op.dim; d += FLOATS)
    for (int64_t n = 0; n < op.heads; ++n) {
      Floats mixed = {};
      for (int64_t k = 0; k < op.window_size; ++k)
        mixed += shares_NK[n * op.window_size + k] * read(keys_KD + k * op.padded() + d);
      write(mixed_ND + n * op.dim + d, mixed, op.dim - d);
    }
}

// Numbers of scratch that either direction needs a block.
HOST_DEVICE int64_t mix_scratch(const MixInBlocks& op) {
  const int64_t keys = GROUP_WINDOWS * op.window_size;
  return keys * (op.padded() + 1 + 2 * op.heads);
}

// Windows first .. last - 1: mixed_MND and shares_MNK.
template <class T>
HOST_DEVICE void mix_block(const MixInBlocks& op, int64_t first, int64_t last, float* keys_KD) {
  const T* table_VD = static_cast<const T*>(op.table_VD);
  float* factors_K = keys_KD + op.window_size * op.padded();
  for (int64_t m = first; m < last; ++m) {
    const int64_t* codes_K = op.codes_MK + m * op.window_size;
    float* shares_NK = op.shares_MNK + m * op.heads * op.window_size;
    if (m + 1 < last) ask_for_rows(op, codes_K + op.window_size, table_VD);
    make_keys(op, codes_K, table_VD, keys_KD, factors_K);
    all_dots(op, op.score_weight_ND, op.padded(), keys_KD, shares_NK);
    softmax(op, codes_K, shares_NK);
    mix(op, shares_NK, keys_KD, static_cast<T*>(op.mixed_MND) + m * op.heads * op.dim);
  }
  if (op.is_past_cache) end_past_cache();
}

// What the shares' gradient makes of the scores' gradient: both in `grads_NK`.
HOST_DEVICE void softmax_backward(const MixInBlocks& op, const float* shares_NK, float* grads_NK) {
  for (int64_t n = 0; n < op.heads; ++n) {
    const float* shares_K = shares_NK + n * op.window_size;
    float* grads_K = grads_NK + n * op.window_size;
    float mean = 0;
    for (int64_t k = 0; k < op.window_size; ++k) mean += shares_K[k] * grads_K[k];
    for (int64_t k = 0; k < op.window_size; ++k) grads_K[k] = shares_K[k] * (grads_K[k] - mean);
  }
}

// 16 columns of the gradients of `Keys` keys, written; adds their products with the keys.
template <int Keys, class T>
HOST_DEVICE void key_grad_columns(const MixInBlocks& op, const float* shares_NK, const float* score_grads_NK, const T* grad_ND,
                                      const float* score_weight_ND, const float* keys_KD, int64_t count, float* key_grads_KD,
                                      Floats (&products)[Keys]) {
  const int64_t padded = op.padded(), size = op.window_size;
  Floats even[Keys] = {}, odd[Keys] = {};
  for (int64_t n = 0; n < op.heads; ++n) {
    const Floats grad = count == FLOATS ? read(grad_ND + n * op.dim) : read(grad_ND + n * op.dim, count);
    const Floats weight = read(score_weight_ND + n * padded);
#pragma GCC unroll 8
    for (int k = 0; k < Keys; ++k) even[k] += shares_NK[n * size + k] * grad;
#pragma GCC unroll 8
    for (int k = 0; k < Keys; ++k) odd[k] += score_grads_NK[n * size + k] * weight;
  }
#pragma GCC unroll 8
  for (int k = 0; k < Keys; ++k) {
    const Floats key_grad = even[k] + odd[k];
    products[k] += key_grad * read(keys_KD + k * padded);
    write(key_grads_KD + k * padded, key_grad);
  }
}

// Gradients of `Keys` rows of the table (before offsets were added, so of the offsets too), in place of those of the keys.
template <int Keys, class T>
HOST_DEVICE void row_grads(const MixInBlocks& op, const float* shares_NK, const float* score_grads_NK, const T* grad_ND,
                               const float* score_weight_ND, const float* keys_KD, const float* factors_K, float* row_grads_KD,
                               float* offset_grads_KD) {
  const int64_t padded = op.padded();
  Floats products[Keys] = {};
  int64_t d = 0;
  for (; d + FLOATS <= op.dim; d += FLOATS)
    key_grad_columns<Keys>(op, shares_NK, score_grads_NK, grad_ND + d, score_weight_ND + d, keys_KD + d, FLOATS,
                           row_grads_KD + d, products);
  if (d < op.dim)
    key_grad_columns<Keys>(op, shares_NK, score_grads_NK, grad_ND + d, score_weight_ND + d, keys_KD + d, op.dim - d,
                           row_grads_KD + d, products);
  for (int k = 0; k < Keys; ++k) {
    const float mean = sum(products[k]) / op.dim, factor = factors_K[k];
    for (d = 0; d < padded; d += FLOATS) {
      const Floats grad = (read(row_grads_KD + k * padded + d) - read(keys_KD + k * padded + d) * mean) * factor;
      write(row_grads_KD + k * padded + d, grad);
      write(offset_grads_KD + k * padded + d, read(offset_grads_KD + k * padded + d) + grad);
    }
  }
}

// Adds score gradients times keys of a group of windows to score_weight_grad_ND; `Heads` rows at a time.
template <int Heads>
HOST_DEVICE void add_score_weight_grad(const MixInBlocks& op, int64_t num_windows, const float* score_grads_MNK,
                                           const float* keys_MKD, float* score_weight_grad_ND) {
  const int64_t padded = op.padded(), size = op.window_size;
  for (int64_t d = 0; d < padded; d += FLOATS) {
    Floats sums[Heads];
#pragma GCC unroll 8
    for (int n = 0; n < Heads; ++n) sums[n] = read(score_weight_grad_ND + n * padded + d);
    for (int64_t m = 0; m < num_windows; ++m)
      for (int64_t k = 0; k < size; ++k) {
        const Floats key = read(keys_MKD + (m * size + k) * padded + d);
#pragma GCC unroll 8
        for (int n = 0; n < Heads; ++n) sums[n] += score_grads_MNK[(m * op.heads + n) * size + k] * key;
      }
#pragma GCC unroll 8
    for (int n = 0; n < Heads; ++n) write(score_weight_grad_ND + n * padded + d, sums[n]);
  }
}

// What windows first .. last - 1 give back.
//
// row_grads_MKD holds their rows' gradients from window `first` on (rows padded to whole vectors); offset_grads_KD and
// score_weight_grad_ND, padded too, are added to.
template <class T>
HOST_DEVICE void mix_block_backward(const MixInBlocks& op, int64_t first, int64_t last, float* row_grads_MKD,
                                    float* offset_grads_KD, float* score_weight_grad_ND, float* scratch) {
  const int64_t size = op.window_size, padded = op.padded(), heads = op.heads;
  float* score_grads_MNK = scratch + GROUP_WINDOWS * size * padded;
  float* factors_K = score_grads_MNK + GROUP_WINDOWS * heads * size;
  for (int64_t begin = first; begin < last; begin += GROUP_WINDOWS) {
    const int64_t num_windows = last - begin < GROUP_WINDOWS ? last - begin : GROUP_WINDOWS;
    for (int64_t w = 0; w < num_windows; ++w) {
      const int64_t m = begin + w;
      const float* shares_NK = op.shares_MNK + m * heads * size;
      const T* grad_ND = static_cast<const T*>(op.mixed_MND) + m * heads * op.dim;
      float *keys_KD = scratch + w * size * padded, *score_grads_NK = score_grads_MNK + w * heads * size;
      float* rows_KD = row_grads_MKD + (m - first) * size * padded;
      if (m + 1 < last) ask_for_rows(op, op.codes_MK + (m + 1) * size, static_cast<const T*>(op.table_VD));
      make_keys(op, op.codes_MK + m * size, static_cast<const T*>(op.table_VD), keys_KD, factors_K);
      all_dots(op, grad_ND, op.dim, keys_KD, score_grads_NK);
      softmax_backward(op, shares_NK, score_grads_NK);
      int64_t k = 0;
      for (; k + 4 <= size; k += 4)
        row_grads<4>(op, shares_NK + k, score_grads_NK + k, grad_ND, op.score_weight_ND, keys_KD + k * padded, factors_K + k,
                     rows_KD + k * padded, offset_grads_KD + k * padded);
      for (; k < size; ++k)
        row_grads<1>(op, shares_NK + k, score_grads_NK + k, grad_ND, op.score_weight_ND, keys_KD + k * padded, factors_K + k,
                     rows_KD + k * padded, offset_grads_KD + k * padded);
    }
    int64_t n = 0;
    for (; n + 4 <= heads; n += 4)
      add_score_weight_grad<4>(op, num_windows, score_grads_MNK + n * size, scratch, score_weight_grad_ND + n * padded);
    for (; n < heads; ++n)
      add_score_weight_grad<1>(op, num_windows, score_grads_MNK + n * size, scratch, score_weight_grad_ND + n * padded);
  }
}

// Adds the rows' gradients of windows first .. last - 1 to those rows of the table that belong to `part` of `parts`, window
// by window: a row's sum has one order whatever `parts` is.
HOST_DEVICE void add_part_of_rows(const MixInBlocks& op, const float* row_grads_MKD, int64_t first, int64_t last, int64_t part,
                                  int64_t parts) {
  const int64_t padded = op.padded(), end = (last - first) * op.window_size;
  const int64_t* codes = op.codes_MK + first * op.window_size;
  for (int64_t i = 0; i < end; ++i) {
    if (i + 4 < end && codes[i + 4] >= 0 && codes[i + 4] % parts == part)
      for (int64_t d = 0; d < op.dim; d += FLOATS) __builtin_prefetch(op.table_grad_VD + codes[i + 4] * op.dim + d, 1);
    if (codes[i] < 0 || codes[i] % parts != part) continue;
    float* to = op.table_grad_VD + codes[i] * op.dim;
    const float* from = row_grads_MKD + i * padded;
    int64_t d = 0;
    for (; d + FLOATS <= op.dim; d += FLOATS) write(to + d, read(to + d) + read(from + d));
    for (; d < op.dim; ++d) to[d] += from[d];
  }
}

}  // namespace tensorar
