// The bodies of the CUDA kernels of mix_windows's backward: the gradient of every row, then the score weight's.
//
// Both write partial sums, which sum_bodies.h adds in their order. What is no code gets a gradient of zero.
#pragma once

#include "window_block.h"

namespace tensorar {

template <class T, class Access>
class MixWindowsBackwardBody : public WindowBlock<T, Access> {
  using Base = WindowBlock<T, Access>;
  using Base::CHUNK, Base::TILE, Base::op, Base::plan, Base::factors, Base::codes;

 public:
  using Base::THREADS;
  static constexpr int BLOCKS_AT_ONCE = 2;

  static HOST_DEVICE int shared_pairs(const MixOnGrid& op) {
    return (op.plan.end + op.plan.rows * (1 + 2 * op.plan.padded_heads)) / 4;
  }

  HOST_DEVICE MixWindowsBackwardBody(const MixOnGrid& op, Pair* shared_memory, int64_t block)
      : Base(op, shared_memory, block),
        block(block),
        means(Base::shared + plan.end),
        pairs(means + plan.rows) {}

  template <class BarrierAfter>
  HOST_DEVICE void run(BarrierAfter barrier_after) {
    Base::make_keys(barrier_after);
    const auto read_head = [this](int head, int window, int chunk) { return grad(head, window, chunk); };
    Base::template dot<CHUNK, 2>(barrier_after, read_head, pairs + 1);
    barrier_after([this](int thread) { softmax_backward(thread); });
    barrier_after([this](int thread) { write_key_grads(thread); });
    Base::fold(barrier_after, plan.rows * plan.slices);
    barrier_after([this](int thread) {
      for (int row = thread; row < plan.rows; row += THREADS)
        means[row] = Base::sum_of_slices(row) / plan.dim * factors[row] * factors[row];
    });
    barrier_after([this](int thread) { write_row_grads(thread); });
    barrier_after([this](int thread) { sum_over_windows(thread); });
  }

 private:
  // Of the mixed vectors; any, where there is no such head or window.
  HOST_DEVICE Columns<CHUNK> grad(int head, int window, int chunk) const {
    const int64_t m = Base::first_window + window, last = op.num_windows - 1;
    const T* of_window = static_cast<const T*>(op.mixed_MND) + (m < last ? m : last) * (plan.heads * plan.dim);
    const int row = head < plan.heads ? head : plan.heads - 1, column = chunk * CHUNK;
    return read_columns<Access, CHUNK>(of_window + (row * plan.dim + column), plan.dim - column);
  }

  // A row's share for a head, then its score's gradient (before, its share's).
  HOST_DEVICE float* pair_at(int row, int head) const { return pairs + 2 * (row * plan.padded_heads + head); }

  // Both are zero where there is no code, window or head.
  HOST_DEVICE void softmax_backward(int thread) const {
    for (int item = thread; item < plan.windows * plan.padded_heads; item += THREADS) {
      const int window = plan.by_padded_heads.quotient(item), head = plan.by_padded_heads.remainder(item);
      const int first = Base::row_of(window, 0);
      const int64_t m = Base::first_window + window;
      float mean = 0;
      for (int k = 0; k < plan.offset_tiles * TILE; ++k) {
        float* const pair = pair_at(first + k, head);
        const bool has_code = head < plan.heads && codes[first + k] >= 0;
        pair[0] = has_code ? op.shares_MNK[(m * plan.heads + head) * plan.offsets + k] : 0.0f;
        if (!has_code) pair[1] = 0.0f;
        mean = fmaf(pair[0], pair[1], mean);
      }
      for (int k = 0; k < plan.offset_tiles * TILE; ++k) {
        float* const pair = pair_at(first + k, head);
        const bool has_code = head < plan.heads && codes[first + k] >= 0;
        pair[1] = has_code ? pair[0] * (pair[1] - mean) : 0.0f;
        if (m < op.num_windows && k < plan.offsets)
          op.key_shares_MKN[(m * plan.offsets + k) * plan.padded_heads + head] = pair[1] * factors[first + k];
      }
    }
  }

  // The keys' gradients in place of the rows, and the sums of their products with these.
  HOST_DEVICE void write_key_grads(int thread) const {
    Base::sum_tiles(thread, [this](int tile, int chunk, Columns<TILE>& products) {
      Columns<CHUNK> key_grads[TILE] = {};
      for (int head = 0; head < plan.padded_heads; head += 2) add_two_heads(tile, head, chunk, key_grads);
      UNROLLED
      for (int i = 0; i < TILE; ++i) {
        const int row = tile * TILE + i;
        products.at[i] = add_dot(products.at[i], key_grads[i], Base::template row_at<CHUNK>(row, chunk));
        Base::set_row_at(row, chunk, key_grads[i]);
      }
    });
  }

  HOST_DEVICE void add_two_heads(int tile, int head, int chunk, Columns<CHUNK> (&key_grads)[TILE]) const {
    Columns<4> two_pairs[TILE];
    UNROLLED
    for (int i = 0; i < TILE; ++i) two_pairs[i] = read_aligned<4>(pair_at(tile * TILE + i, head));
    UNROLLED
    for (int n = 0; n < 2; ++n) {
      const Columns<CHUNK> of_mixed = grad(head + n, plan.by_offset_tiles.quotient(tile), chunk);
      const Columns<CHUNK> weight = Base::template score_weight<CHUNK>(head + n, chunk);
      UNROLLED
      for (int i = 0; i < TILE; ++i) {
        add_product(key_grads[i], two_pairs[i].at[2 * n], of_mixed);
        add_product(key_grads[i], two_pairs[i].at[2 * n + 1], weight);
      }
    }
  }

  // (key gradient - key * mean of their product) * factor, the key being x * factor: in memory, and in place for the sums.
  HOST_DEVICE void write_row_grads(int thread) const {
    for (int item = thread; item < plan.rows * plan.chunks; item += THREADS) {
      const int row = plan.by_chunks.quotient(item), chunk = plan.by_chunks.remainder(item), offset = Base::offset_of_row(row);
      const int64_t m = Base::first_window + Base::window_of_row(row);
      Columns<CHUNK> row_grad{};
      if (codes[row] >= 0) {
        row_grad = Base::template row_at<CHUNK>(row, chunk);
        add_product(row_grad, -means[row], Base::input(row, offset, chunk));
        UNROLLED
        for (int i = 0; i < CHUNK; ++i) row_grad.at[i] *= factors[row];
      }
      Base::set_row_at(row, chunk, row_grad);
      if (m >= op.num_windows || offset >= plan.offsets) continue;
      float* to = op.row_grads_MKD + (m * plan.offsets + offset) * plan.dim + chunk * CHUNK;
      write_columns<Access>(to, row_grad, plan.dim - chunk * CHUNK);
    }
  }

  // The block's part of the gradients of the offset embeddings.
  HOST_DEVICE void sum_over_windows(int thread) const {
    float* to = op.offset_sums_PKD + block * plan.offsets * plan.dim;
    for (int item = thread; item < plan.offsets * plan.chunks; item += THREADS) {
      const int offset = plan.by_chunks.quotient(item), chunk = plan.by_chunks.remainder(item);
      Columns<CHUNK> sums{};
      for (int window = 0; window < plan.windows; ++window)
        add(sums, Base::template row_at<CHUNK>(Base::row_of(window, offset), chunk));
      write_columns<Access>(to + int64_t{offset} * plan.dim + chunk * CHUNK, sums, plan.dim - chunk * CHUNK);
    }
  }

  const int64_t block;
  float* const means;  // times the square of the factor
  float* const pairs;
};

// A warp's part of the score weight's gradient: score gradients times keys of some windows, for four heads and 32 chunks.
template <class T, class Access>
class ScoreWeightGradBody {
 public:
  static constexpr int THREADS = 256, BLOCKS_AT_ONCE = 2, WINDOWS = 16;

  static HOST_DEVICE int64_t num_groups(const MixOnGrid& op) { return (op.num_windows + WINDOWS - 1) / WINDOWS; }
  static HOST_DEVICE int64_t num_blocks(const MixOnGrid& op) { return (num_tasks(op) + WARPS - 1) / WARPS; }
  static HOST_DEVICE int shared_pairs(const MixOnGrid&) { return 0; }

  HOST_DEVICE ScoreWeightGradBody(const MixOnGrid& op, Pair*, int64_t block) : op(op), plan(op.plan), block(block) {}

  template <class BarrierAfter>
  HOST_DEVICE void run(BarrierAfter barrier_after) {
    barrier_after([this](int thread) { write(thread); });
  }

 private:
  static constexpr int WARPS = THREADS / WARP, TILE = MixPlan::TILE, CHUNK = COLUMNS<T>;

  static HOST_DEVICE int slabs(const MixOnGrid& op) { return (op.plan.chunks + WARP - 1) / WARP; }
  static HOST_DEVICE int64_t num_tasks(const MixOnGrid& op) { return num_groups(op) * (slabs(op) * op.plan.head_tiles); }

  // Warps that follow each other take other heads of the same rows, which are in cache then.
  HOST_DEVICE void write(int thread) const {
    const int64_t task = block * WARPS + thread / WARP;
    if (task >= num_tasks(op)) return;
    const int per_group = slabs(op) * plan.head_tiles, of_group = static_cast<int>(task % per_group);
    const int64_t group = task / per_group;
    const int head = plan.by_head_tiles.remainder(of_group) * TILE;
    const int column = (plan.by_head_tiles.quotient(of_group) * WARP + thread % WARP) * CHUNK;
    if (column >= plan.dim) return;
    Columns<CHUNK> sums[TILE] = {};
    for (int k = 0; k < plan.offsets; ++k) add_offset(group, k, head, column, sums);
    float* to = op.weight_sums_GND + (group * plan.heads + head) * plan.dim + column;
    UNROLLED
    for (int n = 0; n < TILE; ++n)
      if (head + n < plan.heads) write_columns<Access>(to + n * plan.dim, sums[n], plan.dim - column);
  }

  HOST_DEVICE void add_offset(int64_t group, int k, int head, int column, Columns<CHUNK> (&sums)[TILE]) const {
    const int64_t left = op.num_windows - group * WINDOWS;
    const int num_windows = left < WINDOWS ? static_cast<int>(left) : WINDOWS;
    const int64_t first = group * WINDOWS * plan.offsets + k;
    const int64_t* codes = op.codes_MK + first;
    const float* key_shares = op.key_shares_MKN + first * plan.padded_heads + head;
    const Columns<CHUNK> offset = read_columns<Access, CHUNK>(op.offsets_KD + k * plan.dim + column, plan.dim - column);
    UNROLLED_BY_4
    for (int window = 0; window < num_windows; ++window) {
      const int64_t code = codes[window * plan.offsets];
      const T* row = static_cast<const T*>(op.table_VD) + (code < 0 ? 0 : code) * plan.dim + column;
      Columns<CHUNK> x = read_columns<Access, CHUNK>(row, plan.dim - column);
      add(x, offset);
      if (code < 0) x = Columns<CHUNK>{};
      const Columns<TILE> key_share = read_aligned<TILE>(key_shares + window * plan.offsets * plan.padded_heads);
      UNROLLED
      for (int n = 0; n < TILE; ++n) add_product(sums[n], key_share.at[n], x);
    }
  }

  const MixOnGrid& op;
  const MixPlan& plan;
  const int64_t block;
};

}  // namespace tensorar
