// The uniforms of sampling, one SIMD lane a Philox call, four codes a call; for every kernel that draws.
#pragma once

#include "philox.h"

namespace tensorar {

constexpr uint32_t SAMPLING_PURPOSE = 5;  // SAMPLING of training/philox.py
constexpr int64_t MAX_CODEBOOK_SIZE = int64_t{1} << 18;

// What a row of draws depends on besides the code.
struct DrawsRow {
  uint64_t sample, position, stream;

  // Whether they fit the counter; else the draws would be those of others.
  HOST_DEVICE bool is_in_range() const { return position < uint64_t{1} << 16 && stream < uint64_t{1} << 32; }
};

HOST_DEVICE PhiloxKeys sampling_keys(int64_t seed) {
  return PhiloxKeys(seed & 0xFFFFFFFF, SAMPLING_PURPOSE | static_cast<uint32_t>(seed >> 32) << 8);
}

constexpr int HALF_LANES = 2 * LANES, CODES_PER_DRAW = 2 * HALF_LANES;
typedef int32_t HalfLanes __attribute__((vector_size(LANES * 8)));
typedef float FloatLanes __attribute__((vector_size(LANES * 8)));
typedef float FloatLanesInMemory __attribute__((vector_size(LANES * 8), aligned(4), may_alias));

// Two words of every lane as (top 23 bits + 0.5) / 2^23, side by side.
HOST_DEVICE FloatLanes uniforms_of(Lanes first, Lanes second) {
  const Lanes bits = low_half(first) >> 9 | low_half(second) >> 9 << 32;
  return (__builtin_convertvector(reinterpret_cast<HalfLanes>(bits), FloatLanes) + 0.5f) * 0x1p-23f;
}

// CODES_PER_DRAW numbers, in the order of their codes.
struct DrawnLanes {
  FloatLanes near, far;
};

// Lane i of both, side by side, becomes pairs 2 i and 2 i + 1.
HOST_DEVICE DrawnLanes in_order(FloatLanes first, FloatLanes second) {
  const Lanes a = reinterpret_cast<Lanes>(first), b = reinterpret_cast<Lanes>(second);
#if defined(__AVX512F__)
  const Lanes near = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  const Lanes far = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#elif defined(__AVX2__)
  const Lanes near = __builtin_shufflevector(a, b, 0, 4, 1, 5), far = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#else
  const Lanes near = __builtin_shufflevector(a, b, 0, 2), far = __builtin_shufflevector(a, b, 1, 3);
#endif
  return {reinterpret_cast<FloatLanes>(near), reinterpret_cast<FloatLanes>(far)};
}

// The uniforms of codes `code` .. `code + CODES_PER_DRAW - 1`; `code` is a multiple of four.
HOST_DEVICE DrawnLanes uniforms_from(const DrawsRow& row, int64_t code, const PhiloxKeys& keys) {
  const Lanes cells = lane_indices() + ((row.position << 16) + code / 4);
  const auto drawn = philox4x32(row.sample & 0xFFFFFFFFu, row.sample >> 32, row.stream, cells, keys);
  return in_order(uniforms_of(drawn.words[0], drawn.words[1]), uniforms_of(drawn.words[2], drawn.words[3]));
}

HOST_DEVICE void store(float* to, DrawnLanes drawn) {
  *reinterpret_cast<FloatLanesInMemory*>(to) = drawn.near;
  *reinterpret_cast<FloatLanesInMemory*>(to + HALF_LANES) = drawn.far;
}

}  // namespace tensorar
