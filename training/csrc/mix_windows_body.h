// The body of mix_windows's CUDA kernel: shares and mixed vectors of some windows a block.
//
// A window of no code gives zeros.
#pragma once

#include "window_block.h"

namespace tensorar {

template <class T, class Access>
class MixWindowsBody : public WindowBlock<T, Access> {
  using Base = WindowBlock<T, Access>;
  using Base::CHUNK, Base::TILE, Base::op, Base::plan, Base::codes;

 public:
  using Base::THREADS;
  static constexpr int BLOCKS_AT_ONCE = 3;

  static HOST_DEVICE int shared_pairs(const MixOnGrid& op) {
    return (op.plan.end + op.plan.rows * op.plan.padded_heads) / 4;
  }

  HOST_DEVICE MixWindowsBody(const MixOnGrid& op, Pair* shared_memory, int64_t block)
      : Base(op, shared_memory, block), shares(Base::shared + plan.end) {}

  template <class BarrierAfter>
  HOST_DEVICE void run(BarrierAfter barrier_after) {
    Base::make_keys(barrier_after);
    const auto read_head = [this](int head, int, int chunk) {
      return Base::template score_weight<COLUMNS<float>>(head, chunk);
    };
    Base::template dot<COLUMNS<float>, 1>(barrier_after, read_head, shares);
    barrier_after([this](int thread) { softmax(thread); });
    barrier_after([this](int thread) { mix(thread); });
  }

 private:
  // In place of its scores, a row's share times its factor; 0 for a row that only fills a tile.
  HOST_DEVICE void softmax(int thread) const {
    for (int item = thread; item < plan.windows * plan.padded_heads; item += THREADS) {
      const int window = plan.by_padded_heads.quotient(item), head = plan.by_padded_heads.remainder(item);
      const int first = Base::row_of(window, 0);
      const auto score = [&](int k) -> float& { return shares[(first + k) * plan.padded_heads + head]; };
      float largest = -INFINITY, total = 0;
      for (int k = 0; k < plan.offsets; ++k)
        if (codes[first + k] >= 0 && !(score(k) <= largest)) largest = score(k);
      for (int k = 0; k < plan.offsets; ++k) {
        score(k) = codes[first + k] < 0 ? 0.0f : expf(score(k) - largest);
        total += score(k);
      }
      const int64_t m = Base::first_window + window;
      for (int k = 0; k < plan.offsets; ++k) {
        const float share = total == 0 ? 0.0f : score(k) / total;
        score(k) = share * Base::factors[first + k];
        if (m < op.num_windows && head < plan.heads) op.shares_MNK[(m * plan.heads + head) * plan.offsets + k] = share;
      }
    }
  }

  // A chunk of four heads a turn.
  HOST_DEVICE void mix(int thread) const {
    for (int item = thread; item < plan.windows * plan.head_tiles * plan.chunks; item += THREADS) {
      const int chunk = plan.by_chunks.remainder(item), tile = plan.by_chunks.quotient(item);
      const int window = plan.by_head_tiles.quotient(tile), head = plan.by_head_tiles.remainder(tile) * TILE;
      Columns<CHUNK> mixed[TILE] = {};
      for (int first = Base::row_of(window, 0); first < Base::row_of(window + 1, 0); first += TILE) {
        UNROLLED
        for (int i = 0; i < TILE; ++i) {
          const Columns<CHUNK> x = Base::template row_at<CHUNK>(first + i, chunk);
          const Columns<TILE> share = read_aligned<TILE>(shares + (first + i) * plan.padded_heads + head);
          UNROLLED
          for (int n = 0; n < TILE; ++n) add_product(mixed[n], share.at[n], x);
        }
      }
      const int64_t m = Base::first_window + window;
      if (m >= op.num_windows) continue;
      T* to = static_cast<T*>(op.mixed_MND) + (m * plan.heads + head) * plan.dim + chunk * CHUNK;
      UNROLLED
      for (int n = 0; n < TILE; ++n)
        if (head + n < plan.heads)
          write_columns<Access>(to + int64_t{n} * plan.dim, mixed[n], plan.dim - chunk * CHUNK);
    }
  }

  float* const shares;
};

}  // namespace tensorar
