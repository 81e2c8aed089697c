// tensorar::cross_entropy_rows: its arguments and the body of its CUDA kernel; training/ops.py says what is computed.
//
// R rows, V codebook_size. A block takes a row: it reads it twice, the second time from a cache, and writes it once.
#pragma once

#include "check.h"
#include "columns.h"

namespace tensorar {

struct CrossEntropyRows {
  int64_t num_rows, codebook_size;
  bool is_bfloat16, needs_grad;
  void* logits_RV;  // in the end their gradient, where that is needed
  const int64_t* targets_R;
  const float* row_weights_R;
  float* entropies_R;
  bool* hits_R;
};

// Of some logits the largest, the first code that has it, and the sum of e^(logit - largest).
struct Peak {
  float largest, sum;
  int64_t code;

  // A logit that is no number leaves a sum that is none.
  HOST_DEVICE void join(const Peak& other) {
    const bool is_above = !(other.largest <= largest) || (other.largest == largest && other.code < code);
    const float top = is_above ? other.largest : largest;
    if (is_above) code = other.code;
    if (top == -INFINITY) return;
    sum = sum * expf(largest - top) + other.sum * expf(other.largest - top);
    largest = top;
  }
};

template <class T, class Access>
class CrossEntropyRowsBody {
 public:
  static constexpr int THREADS = 256, BLOCKS_AT_ONCE = 6;

  static HOST_DEVICE int64_t num_blocks(const CrossEntropyRows& op) { return op.num_rows; }
  static HOST_DEVICE int shared_pairs(const CrossEntropyRows&) { return THREADS + GROUPS + 1; }

  HOST_DEVICE CrossEntropyRowsBody(const CrossEntropyRows& op, Pair* shared_memory, int64_t block)
      : op(op),
        row(block),
        codebook_size(static_cast<int>(op.codebook_size)),
        logits(static_cast<T*>(op.logits_RV) + block * op.codebook_size),
        of_threads(reinterpret_cast<Peak*>(shared_memory)),
        of_groups(of_threads + THREADS),
        target_logit(&of_groups[GROUPS].largest) {}

  template <class BarrierAfter>
  HOST_DEVICE void run(BarrierAfter barrier_after) {
    barrier_after([this](int thread) { of_threads[thread] = peak_of_thread(thread); });
    barrier_after([this](int thread) {
      if (thread < GROUPS) of_groups[thread] = joined(of_threads + thread, THREADS / GROUPS, GROUPS);
      if (thread == GROUPS) *target_logit = widened(logits[target()]);
    });
    barrier_after([this](int thread) { write(thread); });
  }

 private:
  static constexpr int CHUNK = COLUMNS<T>, GROUPS = 16;
  static_assert(sizeof(Peak) == sizeof(Pair));

  HOST_DEVICE Columns<CHUNK> read(int column) const {
    return read_columns<Access, CHUNK>(logits + column, codebook_size - column);
  }

  HOST_DEVICE int target() const {
    const int64_t target = op.targets_R[row];
#if defined(__CUDA_ARCH__)
    if (target < 0 || target >= op.codebook_size) __trap();
#else
    check(target >= 0 && target < op.codebook_size, "cross_entropy_rows: targets must be in [0, ", op.codebook_size, "), got ",
          target);
#endif
    return static_cast<int>(target);
  }

  HOST_DEVICE bool has(int column) const { return __is_same(Access, Aligned) || column < codebook_size; }

  HOST_DEVICE Peak peak_of_thread(int thread) const {
    Peak peak{-INFINITY, 0.0f, op.codebook_size};
    UNROLLED_BY_4
    for (int column = thread * CHUNK; column < codebook_size; column += THREADS * CHUNK) add(peak, column, read(column));
    return peak;
  }

  HOST_DEVICE void add(Peak& peak, int column, const Columns<CHUNK>& some) const {
    float top = some.at[0];
    int place = 0;
    UNROLLED
    for (int i = 1; i < CHUNK; ++i) {
      const bool is_above = has(column + i) && !(some.at[i] <= top);
      top = is_above ? some.at[i] : top;
      place = is_above ? i : place;
    }
    if (!(top <= peak.largest)) {
      peak.sum *= expf(peak.largest - top);
      peak.largest = top;
      peak.code = column + place;
    }
    if (peak.largest == -INFINITY) return;
    UNROLLED
    for (int i = 0; i < CHUNK; ++i)
      if (has(column + i)) peak.sum += expf(some.at[i] - peak.largest);
  }

  static HOST_DEVICE Peak joined(const Peak* peaks, int count, int stride) {
    Peak peak = peaks[0];
    for (int i = 1; i < count; ++i) peak.join(peaks[i * stride]);
    return peak;
  }

  HOST_DEVICE void write(int thread) const {
    const Peak peak = joined(of_groups, GROUPS, 1);
    const int target = this->target();
    if (thread == 0) {
      op.entropies_R[row] = (peak.largest - *target_logit) + logf(peak.sum);
      op.hits_R[row] = peak.code == target;
    }
    if (!op.needs_grad) return;
    const float weight = op.row_weights_R[row], scale = weight / peak.sum;
    UNROLLED_BY_4
    for (int column = thread * CHUNK; column < codebook_size; column += THREADS * CHUNK) {
      Columns<CHUNK> some = read(column);
      UNROLLED
      for (int i = 0; i < CHUNK; ++i) {
        const float share = expf(some.at[i] - peak.largest);
        some.at[i] = fmaf(share, scale, column + i == target ? -weight : 0.0f);
      }
      write_columns<Access>(logits + column, some, codebook_size - column);
    }
  }

  const CrossEntropyRows& op;
  const int64_t row;
  const int codebook_size;
  T* const logits;
  Peak* const of_threads;
  Peak* const of_groups;
  float* const target_logit;
};

}  // namespace tensorar
