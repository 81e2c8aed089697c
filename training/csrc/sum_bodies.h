// Bodies of CUDA kernels that add up what others left in parts, each sum in one order: no atomics.
#pragma once

#include "columns.h"

namespace tensorar {

struct SumParts {
  const float* parts_PE;
  float* to_E;  // added to
  int64_t num_parts, num_elements;
};

// Part by part in 32 stripes, and then these: a chunk of four elements a thread of each stripe.
template <class Access>
class SumPartsBody {
 public:
  static constexpr int THREADS = 256, BLOCKS_AT_ONCE = 4;

  static HOST_DEVICE int64_t num_blocks(const SumParts& sum) {
    return (sum.num_elements + CHUNKS * CHUNK - 1) / (CHUNKS * CHUNK);
  }
  static HOST_DEVICE int shared_pairs(const SumParts&) { return THREADS; }

  HOST_DEVICE SumPartsBody(const SumParts& sum, Pair* shared_memory, int64_t block)
      : sum(sum), first_element(block * CHUNKS * CHUNK), stripes(reinterpret_cast<float*>(shared_memory)) {}

  template <class BarrierAfter>
  HOST_DEVICE void run(BarrierAfter barrier_after) {
    barrier_after([this](int thread) { sum_stripe(thread); });
    barrier_after([this](int thread) { add_stripes(thread); });
  }

 private:
  static constexpr int CHUNK = COLUMNS<float>, CHUNKS = 8, STRIPES = THREADS / CHUNKS;

  HOST_DEVICE int64_t element(int thread) const { return first_element + thread % CHUNKS * CHUNK; }
  HOST_DEVICE int left(int thread) const {
    const int64_t left = sum.num_elements - element(thread);
    return left < CHUNK ? static_cast<int>(left) : CHUNK;
  }

  HOST_DEVICE void sum_stripe(int thread) const {
    Columns<CHUNK> sums{};
    if (left(thread) > 0) {
      UNROLLED_BY_4
      for (int64_t part = thread / CHUNKS; part < sum.num_parts; part += STRIPES)
        add(sums, read_columns<Access, CHUNK>(sum.parts_PE + part * sum.num_elements + element(thread), left(thread)));
    }
    write_aligned(stripes + thread * CHUNK, sums);
  }

  HOST_DEVICE void add_stripes(int thread) const {
    if (thread >= CHUNKS || left(thread) <= 0) return;
    Columns<CHUNK> sums = read_aligned<CHUNK>(stripes + thread * CHUNK);
    UNROLLED
    for (int stripe = 1; stripe < STRIPES; ++stripe)
      add(sums, read_aligned<CHUNK>(stripes + (stripe * CHUNKS + thread) * CHUNK));
    float* to = sum.to_E + element(thread);
    Columns<CHUNK> total = read_columns<Access, CHUNK>(to, left(thread));
    add(total, sums);
    write_columns<Access>(to, total, left(thread));
  }

  const SumParts& sum;
  const int64_t first_element;
  float* const stripes;
};

struct AddRows {
  const int64_t* codes_R;   // sorted
  const int64_t* places_R;  // which row of rows_RD each is of; ascending where codes are equal
  const float* rows_RD;
  float* table_VD;  // added to
  int64_t num_rows, dim;
};

// All rows of a code, one after the other: by the block of the first. A code below 0 has no row in the table.
template <class Access>
class AddRowsBody {
 public:
  static constexpr int THREADS = 256, BLOCKS_AT_ONCE = 4;

  static HOST_DEVICE int64_t num_blocks(const AddRows& op) { return op.num_rows; }
  static HOST_DEVICE int shared_pairs(const AddRows&) { return 0; }

  HOST_DEVICE AddRowsBody(const AddRows& op, Pair*, int64_t block) : op(op), first(block) {}

  template <class BarrierAfter>
  HOST_DEVICE void run(BarrierAfter barrier_after) {
    barrier_after([this](int thread) { add_all(thread); });
  }

 private:
  static constexpr int CHUNK = COLUMNS<float>, ROWS = 8;

  HOST_DEVICE void add_all(int thread) const {
    const int64_t code = op.codes_R[first];
    if (code < 0 || (first > 0 && op.codes_R[first - 1] == code)) return;
    const int dim = static_cast<int>(op.dim);
    const int64_t end = end_of_run(code);
    for (int column = thread * CHUNK; column < dim; column += THREADS * CHUNK) {
      const auto row_at = [&](int64_t i) {
        return read_columns<Access, CHUNK>(op.rows_RD + op.places_R[i] * dim + column, dim - column);
      };
      float* to = op.table_VD + code * dim + column;
      Columns<CHUNK> sums = read_columns<Access, CHUNK>(to, dim - column);
      int64_t i = first;
      for (; i + ROWS <= end; i += ROWS) {  // many reads under way at a time; added in the order of the rows all the same
        Columns<CHUNK> rows[ROWS];
        UNROLLED
        for (int r = 0; r < ROWS; ++r) rows[r] = row_at(i + r);
        UNROLLED
        for (int r = 0; r < ROWS; ++r) add(sums, rows[r]);
      }
      for (; i < end; ++i) add(sums, row_at(i));
      write_columns<Access>(to, sums, dim - column);
    }
  }

  // Where the next code begins: steps that double until they are beyond it, then halves of the last one.
  HOST_DEVICE int64_t end_of_run(int64_t code) const {
    const auto is_of_code = [&](int64_t i) { return i < op.num_rows && op.codes_R[i] == code; };
    int64_t last = first, step = 1;
    for (; is_of_code(last + step); step *= 2) last += step;
    for (; step > 0; step /= 2) {
      if (is_of_code(last + step)) last += step;
    }
    return last + 1;
  }

  const AddRows& op;
  const int64_t first;
};

}  // namespace tensorar
