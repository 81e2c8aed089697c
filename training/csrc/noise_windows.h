// tensorar::noise_windows: its arguments, the rule of one element, and the body of its CUDA kernel.
//
// B samples, T positions, K window_size. The rule is documented bit for bit in training/ops.py.
#pragma once

#include "launch.h"
#include "philox.h"

namespace tensorar {

struct NoiseWindows {
  static constexpr int MAX_WINDOW_SIZE = 256, MAX_POSITIONS = 1 << 15;

  const int64_t* codes_BT;
  const int64_t* samples_B;
  int64_t* windows_BTK;
  int64_t num_samples;
  int32_t num_positions, window_size;
  bool is_shared;
  uint32_t codebook_size, step;
  PhiloxKeys keys;
  int64_t thresholds_K[MAX_WINDOW_SIZE];

  // Counter word 3: of the window and the offset, or of the position of the code.
  template <class Position>
  HOST_DEVICE Position cell(Position position, uint32_t offset) const {
    return is_shared ? (position + offset) << 16 : position << 16 | offset;
  }

  // The word that is compared with the threshold, and the code that replaces where it is lower.
  template <class Word>
  HOST_DEVICE void draw(uint64_t sample, Word cell, Word& chance, Word& replacement) const {
    const auto drawn = philox4x32(sample & 0xFFFFFFFFu, sample >> 32, uint64_t{step}, cell, keys);
    chance = low_half(drawn.words[0]);
    replacement = multiply(drawn.words[1], codebook_size) >> 32;
  }
};

// A block writes PAIRS_PER_THREAD pairs of elements a thread, in the order of memory, from codes in shared memory.
class NoiseWindowsBody {
 public:
  static constexpr int THREADS = 256, BLOCKS_AT_ONCE = 6, PAIRS_PER_THREAD = 4, ELEMENTS = 2 * THREADS * PAIRS_PER_THREAD;

  static HOST_DEVICE int64_t num_elements(const NoiseWindows& op) {
    return op.num_samples * op.num_positions * op.window_size;
  }
  static HOST_DEVICE int64_t num_blocks(const NoiseWindows& op) { return (num_elements(op) + ELEMENTS - 1) / ELEMENTS; }

  // Thresholds, then the codes that the windows of the block hold.
  static HOST_DEVICE int shared_pairs(const NoiseWindows& op) { return pairs_of_thresholds(op) + pairs_of_codes(op); }

  HOST_DEVICE NoiseWindowsBody(const NoiseWindows& op, Pair* shared_memory, int64_t block)
      : op(op),
        by_window_size(op.window_size),
        by_num_positions(op.num_positions),
        first_element(block * ELEMENTS),
        first_window(first_element / op.window_size),
        first_code(first_window & ~int64_t{1}),
        first_offset(first_element % op.window_size),
        first_sample(first_window / op.num_positions),
        first_position(first_window % op.num_positions),
        thresholds(&shared_memory->first),
        tile(shared_memory + pairs_of_thresholds(op)) {}

  template <class BarrierAfter>
  HOST_DEVICE void run(BarrierAfter barrier_after) {
    barrier_after([this](int thread) { read(thread); });
    barrier_after([this](int thread) { write(thread); });
  }

 private:
  static HOST_DEVICE int pairs_of_thresholds(const NoiseWindows& op) { return (op.window_size + 1) / 2; }
  static HOST_DEVICE int pairs_of_codes(const NoiseWindows& op) {
    return (ELEMENTS / op.window_size + op.window_size + 4) / 2;
  }

  HOST_DEVICE void read(int thread) {
    for (int offset = thread; offset < op.window_size; offset += THREADS) thresholds[offset] = op.thresholds_K[offset];
    const int64_t num_codes = op.num_samples * op.num_positions;
    for (int pair = thread; pair < pairs_of_codes(op); pair += THREADS) {
      const int64_t code = first_code + 2 * pair;
      if (code + 1 < num_codes) {
        tile[pair] = *reinterpret_cast<const Pair*>(op.codes_BT + code);
      } else if (code < num_codes) {
        tile[pair].first = op.codes_BT[code];
      }
    }
  }

  HOST_DEVICE void write(int thread) const {
    for (int turn = 0; turn < PAIRS_PER_THREAD; ++turn) {
      const uint32_t at = 2 * (turn * THREADS + thread);
      const int64_t num_left = num_elements(op) - first_element - at;
      if (num_left <= 0) return;
      int64_t* const to = op.windows_BTK + first_element + at;
      const Pair pair{element(at), num_left > 1 ? element(at + 1) : 0};
      if (num_left > 1) {
        *reinterpret_cast<Pair*>(to) = pair;
      } else {
        *to = pair.first;
      }
    }
  }

  HOST_DEVICE int64_t element(uint32_t at) const {
    const uint32_t window = by_window_size.quotient(first_offset + at);
    const uint32_t offset = by_window_size.remainder(first_offset + at);
    const uint32_t position = by_num_positions.remainder(first_position + window);
    const uint64_t threshold = thresholds[offset];
    if (threshold != 0) {
      const uint32_t sample = by_num_positions.quotient(first_position + window);
      uint64_t chance, replacement;
      op.draw<uint64_t>(op.samples_B[first_sample + sample], op.cell<uint64_t>(position, offset), chance, replacement);
      if (chance < threshold) return replacement;
    }
    const int64_t* codes = &tile->first + (first_window - first_code);
    return position + offset < op.num_positions ? codes[window + offset] : 0;
  }

  const NoiseWindows& op;
  const Divisor by_window_size, by_num_positions;
  const int64_t first_element, first_window, first_code;
  const uint32_t first_offset;
  const int64_t first_sample;
  const uint32_t first_position;
  int64_t* const thresholds;
  Pair* const tile;
};

}  // namespace tensorar
