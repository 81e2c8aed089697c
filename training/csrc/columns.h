// Some columns of a row as floats in a thread's registers, for the bodies of CUDA kernels: 16 bytes a load or store
// where rows are `Aligned`, number by number where they are `Unaligned` (or end within a load).
//
// Sums are fused multiply-adds everywhere, so that a body run on the CPU rounds as it does on a device.
#pragma once

#include <math.h>

#include "bfloat16.h"
#include "launch.h"

#if defined(__CUDACC__)
#define UNROLLED _Pragma("unroll")
#define UNROLLED_BY_4 _Pragma("unroll 4")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#define UNROLLED_BY_4 _Pragma("GCC unroll 4")
#endif

namespace tensorar {

// Whether every row starts on a multiple of 16 bytes and is a whole number of loads long.
struct Aligned {};
struct Unaligned {};

// What one load of 16 bytes holds.
template <class T>
constexpr int COLUMNS = 16 / sizeof(T);

template <int COUNT>
struct Columns {
  float at[COUNT];
};

HOST_DEVICE float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
HOST_DEVICE uint32_t as_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

HOST_DEVICE float widened(float value) { return value; }
HOST_DEVICE float widened(BFloat16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }

// Round to nearest, ties to even; every NaN is 0x7fff, as on a device.
HOST_DEVICE uint32_t bfloat16_bits(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = as_bits(value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
HOST_DEVICE void narrow(float value, float& to) { to = value; }
HOST_DEVICE void narrow(float value, BFloat16& to) { to.bits = static_cast<uint16_t>(bfloat16_bits(value)); }

HOST_DEVICE void unpack(uint64_t bits, float* to, const float*) {
  to[0] = as_float(static_cast<uint32_t>(bits));
  to[1] = as_float(static_cast<uint32_t>(bits >> 32));
}

HOST_DEVICE void unpack(uint64_t bits, float* to, const BFloat16*) {
  const uint32_t halves[2] = {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
  UNROLLED
  for (int i = 0; i < 2; ++i) {
    to[2 * i] = as_float(halves[i] << 16);
    to[2 * i + 1] = as_float(halves[i] & 0xffff0000u);
  }
}

HOST_DEVICE int64_t packed(const float* from, const float*) {
  return static_cast<int64_t>(as_bits(from[0]) | static_cast<uint64_t>(as_bits(from[1])) << 32);
}

// Two numbers as bfloat16, rounded to nearest.
HOST_DEVICE uint32_t bfloat16_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return bfloat16_bits(low) | bfloat16_bits(high) << 16;
#endif
}

HOST_DEVICE int64_t packed(const float* from, const BFloat16*) {
  const uint64_t low = bfloat16_pair(from[0], from[1]), high = bfloat16_pair(from[2], from[3]);
  return static_cast<int64_t>(low | high << 32);
}

// COUNT numbers from a multiple of 16 bytes on.
template <int COUNT, class T>
HOST_DEVICE Columns<COUNT> read_aligned(const T* from) {
  static_assert(COUNT % COLUMNS<T> == 0);
  Columns<COUNT> columns;
  UNROLLED
  for (int i = 0; i < COUNT; i += COLUMNS<T>) {
    const Pair pair = *reinterpret_cast<const Pair*>(from + i);
    unpack(pair.first, columns.at + i, from);
    unpack(pair.second, columns.at + i + COLUMNS<T> / 2, from);
  }
  return columns;
}

template <int COUNT, class T>
HOST_DEVICE void write_aligned(T* to, const Columns<COUNT>& columns) {
  static_assert(COUNT % COLUMNS<T> == 0);
  UNROLLED
  for (int i = 0; i < COUNT; i += COLUMNS<T>) {
    const Pair pair{packed(columns.at + i, to), packed(columns.at + i + COLUMNS<T> / 2, to)};
    *reinterpret_cast<Pair*>(to + i) = pair;
  }
}

// COUNT numbers of a row; of an unaligned one those that are `left`, then zeros.
template <class Access, int COUNT, class T>
HOST_DEVICE Columns<COUNT> read_columns(const T* from, int left) {
  if constexpr (__is_same(Access, Aligned)) {
    return read_aligned<COUNT>(from);
  } else {
    Columns<COUNT> columns;
    UNROLLED
    for (int i = 0; i < COUNT; ++i) columns.at[i] = i < left ? widened(from[i]) : 0.0f;
    return columns;
  }
}

template <class Access, int COUNT, class T>
HOST_DEVICE void write_columns(T* to, const Columns<COUNT>& columns, int left) {
  if constexpr (__is_same(Access, Aligned)) {
    write_aligned(to, columns);
  } else {
    UNROLLED
    for (int i = 0; i < COUNT; ++i)
      if (i < left) narrow(columns.at[i], to[i]);
  }
}

template <int COUNT>
HOST_DEVICE void add_product(Columns<COUNT>& sums, float factor, const Columns<COUNT>& columns) {
  UNROLLED
  for (int i = 0; i < COUNT; ++i) sums.at[i] = fmaf(factor, columns.at[i], sums.at[i]);
}

template <int COUNT>
HOST_DEVICE float add_dot(float sum, const Columns<COUNT>& a, const Columns<COUNT>& b) {
  UNROLLED
  for (int i = 0; i < COUNT; ++i) sum = fmaf(a.at[i], b.at[i], sum);
  return sum;
}

template <int COUNT>
HOST_DEVICE void add(Columns<COUNT>& sums, const Columns<COUNT>& columns) {
  UNROLLED
  for (int i = 0; i < COUNT; ++i) sums.at[i] += columns.at[i];
}

}  // namespace tensorar
