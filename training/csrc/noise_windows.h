// tensorar::noise_windows: its arguments, the one rule that every kernel of it follows, and the body of its CUDA kernel.
//
// B samples, T positions, K window_size. The rule is documented bit for bit in training/ops.py.
#pragma once

#include "philox.h"

namespace tensorar {

constexpr int MAX_WINDOW_SIZE = 256;
constexpr int MAX_POSITIONS = 1 << 15;

struct NoiseWindows {
  const int64_t* codes_BT;
  const int64_t* samples_B;
  int64_t* windows_BTK;
  int64_t num_samples;
  int32_t num_positions;
  int32_t window_size;
  bool is_shared;
  uint32_t codebook_size, step, key0, key1;
  int64_t thresholds_K[MAX_WINDOW_SIZE];
};

struct Draw {
  uint64_t chance, replacement;
};

// Counter word 3 of an element: of its window and offset, or of the position of its code.
template <class Position>
HOST_DEVICE Position cell_of(const NoiseWindows& op, Position position, uint64_t offset) {
  return op.is_shared ? (position + offset) << 16 : position << 16 | offset;
}

// Overwrites cells with the words that are compared with a threshold, and returns the codes that replace.
template <class Word>
HOST_DEVICE Word draw(const NoiseWindows& op, uint64_t sample, Word& cells) {
  const Word zero = cells ^ cells;
  Word words[4] = {zero + (sample & 0xFFFFFFFFu), zero + (sample >> 32), zero + op.step, cells};
  philox4x32(words, op.key0, op.key1);
  cells = low_half(words[0]);
  return multiply(words[1], op.codebook_size) >> 32;
}

}  // namespace tensorar
