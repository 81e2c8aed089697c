// What the bodies of mix_windows and of its backward share: some windows a block, their rows in shared memory, and dot
// products of those with a row a head.
//
// A row x = table[code] + offset stays as it is: its norm is one factor, which the numbers made of it are multiplied by.
// Windows and offsets that only fill a block have code -1. Every sum has an order that sizes alone determine: a warp's 32
// partial sums, of columns 32 chunks apart, are added in two steps, eight each and then four.
#pragma once

#include "check.h"
#include "columns.h"
#include "mix_windows_arguments.h"

namespace tensorar {

// Where everything is in a block's shared memory, in numbers of floats; offsets are padded to whole tiles of 4 rows, heads to
// whole tiles of 4, columns to whole chunks, and rows lie `pitch` apart, which is whole pairs of quarters. Made on the host: a
// thread divides by no number that it does not know.
struct MixPlan {
  static constexpr int THREADS = 256, WARPS = THREADS / WARP, TILE = 4;
  static constexpr int DOTS = WARPS * TILE * TILE;  // that a block computes at a time
  static constexpr int PARTIALS = WARP + 4;         // a sum; so apart that threads of a warp meet in no bank

  int windows, offsets, offset_tiles, tiles, rows, slices;
  int dim, chunks, stride, pitch, heads, head_tiles, padded_heads;
  int partials, factors, codes, end;
  Divisor by_offset_tiles, by_tiles, by_slices, by_chunks, by_head_tiles, by_padded_heads;

  explicit MixPlan(const MixWindows& op)
      : windows(windows_per_block(op)),
        offsets(static_cast<int>(op.window_size)),
        offset_tiles((offsets + TILE - 1) / TILE),
        tiles(windows * offset_tiles),
        rows(tiles * TILE),
        slices(tiles < WARPS ? WARPS / tiles : 1),
        dim(static_cast<int>(op.dim)),
        chunks((dim + chunk_of(op) - 1) / chunk_of(op)),
        stride(chunks * chunk_of(op)),
        pitch((stride + 7) / 8 * 8),
        heads(static_cast<int>(op.heads)),
        head_tiles((heads + TILE - 1) / TILE),
        padded_heads(head_tiles * TILE),
        partials(rows * pitch),
        factors(partials + (rows * slices > DOTS ? rows * slices : DOTS) * PARTIALS),
        codes(factors + rows),
        end(codes + rows),
        by_offset_tiles(offset_tiles),
        by_tiles(tiles),
        by_slices(slices),
        by_chunks(chunks),
        by_head_tiles(head_tiles),
        by_padded_heads(padded_heads) {}

  static int chunk_of(const MixWindows& op) { return op.is_bfloat16 ? COLUMNS<BFloat16> : COLUMNS<float>; }

  // Most windows whose rows take a part of shared memory that lets a multiprocessor hold two blocks.
  static int windows_per_block(const MixWindows& op) {
    const int64_t bytes = (op.window_size + 3) / 4 * 4 * ((op.dim + 7) / 8 * 8) * int64_t{sizeof(float)};
    return bytes * 4 <= 64 << 10 ? 4 : bytes * 2 <= 64 << 10 ? 2 : 1;
  }
};

struct MixOnGrid : MixWindows {
  MixPlan plan;
  // Of the backward: what it writes for other bodies to sum.
  float* row_grads_MKD = nullptr;
  float* key_shares_MKN = nullptr;   // of the score weight's gradient; heads are padded
  float* offset_sums_PKD = nullptr;  // of each block
  float* weight_sums_GND = nullptr;

  explicit MixOnGrid(const MixWindows& op) : MixWindows(op), plan(op) {}
};

template <class T, class Access>
class WindowBlock {
 public:
  static constexpr int THREADS = MixPlan::THREADS;

  static HOST_DEVICE int64_t num_blocks(const MixOnGrid& op) {
    return (op.num_windows + op.plan.windows - 1) / op.plan.windows;
  }

 protected:
  static constexpr int WARPS = MixPlan::WARPS, TILE = MixPlan::TILE, CHUNK = COLUMNS<T>;
  static constexpr int PARTIALS = MixPlan::PARTIALS;

  HOST_DEVICE WindowBlock(const MixOnGrid& op, Pair* shared_memory, int64_t block)
      : op(op),
        plan(op.plan),
        first_window(block * plan.windows),
        shared(reinterpret_cast<float*>(shared_memory)),
        partials(shared + plan.partials),
        factors(shared + plan.factors),
        codes(reinterpret_cast<int*>(shared + plan.codes)) {}

  // Of the block.
  HOST_DEVICE int window_of_row(int row) const { return plan.by_offset_tiles.quotient(row / TILE); }
  HOST_DEVICE int offset_of_row(int row) const { return row - row_of(window_of_row(row), 0); }
  HOST_DEVICE int row_of(int window, int offset) const { return window * plan.offset_tiles * TILE + offset; }

  // Quarters of four columns, every other eight of them swapped in pairs: so no two threads meet in a bank, whether
  // threads that follow each other read one quarter each or two. A pitch of whole pairs keeps the last within its row.
  HOST_DEVICE float* quarter_at(int row, int quarter) const {
    return shared + row * plan.pitch + 4 * (quarter ^ (quarter >> 3 & 1));
  }

  template <int COUNT>
  HOST_DEVICE Columns<COUNT> row_at(int row, int chunk) const {
    Columns<COUNT> columns;
    UNROLLED
    for (int i = 0; i < COUNT / 4; ++i) {
      const Columns<4> quarter = read_aligned<4>(quarter_at(row, chunk * (COUNT / 4) + i));
      UNROLLED
      for (int j = 0; j < 4; ++j) columns.at[4 * i + j] = quarter.at[j];
    }
    return columns;
  }

  HOST_DEVICE void set_row_at(int row, int chunk, const Columns<CHUNK>& columns) const {
    UNROLLED
    for (int i = 0; i < CHUNK / 4; ++i) {
      Columns<4> quarter;
      UNROLLED
      for (int j = 0; j < 4; ++j) quarter.at[j] = columns.at[4 * i + j];
      write_aligned(quarter_at(row, chunk * (CHUNK / 4) + i), quarter);
    }
  }

  // A chunk of table[code] + offset; zeros where there is no code.
  HOST_DEVICE Columns<CHUNK> input(int row, int offset, int chunk) const {
    const int code = codes[row], column = chunk * CHUNK;
    if (code < 0) return Columns<CHUNK>{};
    const T* of_code = static_cast<const T*>(op.table_VD) + int64_t{code} * plan.dim + column;
    Columns<CHUNK> x = read_columns<Access, CHUNK>(of_code, plan.dim - column);
    add(x, read_columns<Access, CHUNK>(op.offsets_KD + offset * plan.dim + column, plan.dim - column));
    return x;
  }

  template <int COUNT>
  HOST_DEVICE Columns<COUNT> score_weight(int head, int chunk) const {
    const int column = chunk * COUNT, row = head < plan.heads ? head : plan.heads - 1;
    return read_columns<Access, COUNT>(op.score_weight_ND + row * plan.dim + column, plan.dim - column);
  }

  // Codes, rows and their factors.
  template <class BarrierAfter>
  HOST_DEVICE void make_keys(BarrierAfter barrier_after) {
    barrier_after([this](int thread) {
      for (int row = thread; row < plan.rows; row += THREADS) codes[row] = read_code(row);
    });
    barrier_after([this](int thread) { read_rows(thread); });
    fold(barrier_after, plan.rows * plan.slices);
    barrier_after([this](int thread) {
      for (int row = thread; row < plan.rows; row += THREADS)
        factors[row] = codes[row] < 0 ? 0.0f : 1.0f / sqrtf(sum_of_slices(row) / plan.dim + NORM_EPS);
    });
  }

  // dots[(row * padded_heads + head) * STRIDE]: a row's key times read_head(head, window of the block, chunk of COUNT).
  template <int COUNT, int STRIDE, class BarrierAfter, class ReadHead>
  HOST_DEVICE void dot(BarrierAfter barrier_after, ReadHead read_head, float* dots) {
    barrier_after.by_warps([this, read_head, dots](int warp, auto warp_after) {
      for (int task = warp; task < plan.tiles * plan.head_tiles; task += WARPS) {
        const int head = plan.by_tiles.quotient(task) * TILE, tile = plan.by_tiles.remainder(task);
        float* const of_warp = partials + warp * TILE * TILE * PARTIALS;
        warp_after([&](int lane) { dot_tile<COUNT>(tile, head, lane, read_head, of_warp); });
        warp_after([&](int lane) {
          for (int item = lane; item < 4 * TILE * TILE; item += WARP) fold_item(of_warp, item);
        });
        warp_after([&](int lane) {
          if (lane >= TILE * TILE) return;
          const int row = tile * TILE + lane % TILE;
          dots[(row * plan.padded_heads + head + lane / TILE) * STRIDE] = folded(of_warp, lane) * factors[row];
        });
      }
    });
  }

  // visit(tile, chunk, sums), and then the sums over a row's columns (see sum_of_slices) once they are folded.
  template <class Visit>
  HOST_DEVICE void sum_tiles(int thread, Visit visit) const {
    const int lane = thread % WARP;
    for (int task = thread / WARP; task < plan.tiles * plan.slices; task += WARPS) {
      const int tile = plan.by_slices.quotient(task), slice = plan.by_slices.remainder(task);
      Columns<TILE> sums{};
      for (int chunk = slice * WARP + lane; chunk < plan.chunks; chunk += plan.slices * WARP) visit(tile, chunk, sums);
      UNROLLED
      for (int i = 0; i < TILE; ++i)
        partials[((tile * TILE + i) * plan.slices + slice) * PARTIALS + lane] = sums.at[i];
    }
  }

  template <class BarrierAfter>
  HOST_DEVICE void fold(BarrierAfter barrier_after, int num_sums) {
    barrier_after([this, num_sums](int thread) {
      for (int item = thread; item < 4 * num_sums; item += THREADS) fold_item(partials, item);
    });
  }

  // After a fold.
  HOST_DEVICE float sum_of_slices(int row) const {
    float sum = 0;
    for (int slice = 0; slice < plan.slices; ++slice) sum += folded(partials, row * plan.slices + slice);
    return sum;
  }

  const MixOnGrid& op;
  const MixPlan& plan;
  const int64_t first_window;
  float* const shared;
  float* const partials;
  float* const factors;
  int* const codes;  // -1 where nothing is attended to

 private:
  // Every fourth of 32 partial sums, in place.
  static HOST_DEVICE void fold_item(float* sums, int item) {
    float* of_item = sums + item / 4 * PARTIALS + item % 4;
    float sum = of_item[0];
    UNROLLED
    for (int i = 4; i < WARP; i += 4) sum += of_item[i];
    of_item[0] = sum;
  }

  static HOST_DEVICE float folded(const float* sums, int index) {
    const Columns<4> four = read_aligned<4>(sums + index * PARTIALS);
    return (four.at[0] + four.at[1]) + (four.at[2] + four.at[3]);
  }

  HOST_DEVICE int read_code(int row) const {
    const int64_t window = first_window + window_of_row(row);
    const int offset = offset_of_row(row);
    if (window >= op.num_windows || offset >= plan.offsets) return -1;
    const int64_t code = op.codes_MK[window * plan.offsets + offset];
#if defined(__CUDA_ARCH__)
    if (code >= op.codebook_size) __trap();
#else
    check(code < op.codebook_size, "mix_windows: codes must be below the table's ", op.codebook_size, " rows, got ", code);
#endif
    return code < 0 ? -1 : static_cast<int>(code);
  }

  HOST_DEVICE void read_rows(int thread) const {
    sum_tiles(thread, [this](int tile, int chunk, Columns<TILE>& squares) {
      const int offset = offset_of_row(tile * TILE);
      UNROLLED
      for (int i = 0; i < TILE; ++i) {
        const int row = tile * TILE + i;
        const Columns<CHUNK> x = input(row, offset + i, chunk);
        set_row_at(row, chunk, x);
        squares.at[i] = add_dot(squares.at[i], x, x);
      }
    });
  }

  // A warp's partial dot products of four heads and four rows of a window.
  template <int COUNT, class ReadHead>
  HOST_DEVICE void dot_tile(int tile, int head, int lane, ReadHead read_head, float* of_warp) const {
    const int window = plan.by_offset_tiles.quotient(tile);
    Columns<TILE> sums[TILE] = {};
    for (int chunk = lane; chunk < plan.stride / COUNT; chunk += WARP) {
      Columns<COUNT> rows[TILE];
      UNROLLED
      for (int i = 0; i < TILE; ++i) rows[i] = row_at<COUNT>(tile * TILE + i, chunk);
      UNROLLED
      for (int n = 0; n < TILE; ++n) {
        const Columns<COUNT> of_head = read_head(head + n, window, chunk);
        UNROLLED
        for (int i = 0; i < TILE; ++i) sums[n].at[i] = add_dot(sums[n].at[i], of_head, rows[i]);
      }
    }
    UNROLLED
    for (int n = 0; n < TILE; ++n) {
      UNROLLED
      for (int i = 0; i < TILE; ++i) of_warp[(n * TILE + i) * PARTIALS + lane] = sums[n].at[i];
    }
  }
};

}  // namespace tensorar
