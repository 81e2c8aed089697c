// Sixteen floats at a time, on whatever the processor has: the compiler splits them where registers are narrower.
// Numbers are read and written as float or bfloat16 (round to nearest, ties to even); arithmetic is in float.
#pragma once

#include "bfloat16.h"
#include "lanes.h"

namespace tensorar {

constexpr int FLOATS = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef float FloatsInMemory __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t WideBits __attribute__((vector_size(64)));
typedef uint16_t Bits __attribute__((vector_size(32)));

HOST_DEVICE Floats read(const float* from) { return *reinterpret_cast<const FloatsInMemory*>(from); }

HOST_DEVICE Floats read(const BFloat16* from) {
  Bits bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return reinterpret_cast<Floats>(__builtin_convertvector(bits, WideBits) << 16);
}

HOST_DEVICE void write(float* to, Floats values) { *reinterpret_cast<FloatsInMemory*>(to) = values; }

// Past the caches, where what is written is not read again soon; `to` on a multiple of 64 bytes.
HOST_DEVICE void write_past_cache(float* to, Floats values) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)values);
#else
  write(to, values);
#endif
}

// Before another thread may read what was written past the caches.
HOST_DEVICE void end_past_cache() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// Every NaN is 0x7fff, as on a device: rounded as a number, some would be zeros.
HOST_DEVICE void write(BFloat16* to, Floats values) {
  const WideBits wide = reinterpret_cast<WideBits>(values), is_nan = reinterpret_cast<WideBits>(values != values);
  const WideBits rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  const Bits bits = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fff), Bits);
  __builtin_memcpy(to, &bits, sizeof bits);
}

HOST_DEVICE void write_past_cache(BFloat16* to, Floats values) { write(to, values); }

// The last columns of a row whose length is no multiple of 16: zeros stand for those beyond it.
template <class T>
HOST_DEVICE Floats read(const T* from, int64_t count) {
  if (count >= FLOATS) return read(from);
  T padded[FLOATS] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return read(padded);
}

template <class T>
HOST_DEVICE void write(T* to, Floats values, int64_t count) {
  if (count >= FLOATS) return write(to, values);
  T padded[FLOATS];
  write(padded, values);
  for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
}

HOST_DEVICE Floats spread(float value) { return Floats{} + value; }

HOST_DEVICE float sum(Floats values) {
  typedef float Half __attribute__((vector_size(32)));
  typedef float Quarter __attribute__((vector_size(16)));
  const Half half = __builtin_shufflevector(values, values, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(values, values, 8, 9, 10, 11, 12, 13, 14, 15);
  const Quarter quarter = __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
  return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}

}  // namespace tensorar
