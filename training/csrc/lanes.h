// SIMD lanes of 64 bits, as many as the instruction set that this file is compiled for has.
#pragma once

#include <stdint.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// Always inlined: else the linker could keep a copy that was compiled for another instruction set.
#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace tensorar {

// A word lives in the low half of 64 bits; the high half holds leftovers that no multiplication reads.
HOST_DEVICE uint64_t multiply(uint64_t a, uint32_t b) { return static_cast<uint64_t>(static_cast<uint32_t>(a)) * b; }

#if !defined(__CUDACC__)

#if defined(__AVX512F__)
constexpr int LANES = 8;
#elif defined(__AVX2__)
constexpr int LANES = 4;
#else
constexpr int LANES = 2;
#endif

typedef uint64_t Lanes __attribute__((vector_size(LANES * 8)));
typedef uint64_t LanesInMemory __attribute__((vector_size(LANES * 8), aligned(8), may_alias));

HOST_DEVICE Lanes multiply(Lanes a, uint32_t b) {
  const Lanes factor = Lanes{} + b;
#if defined(__AVX512F__)
  return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)factor);
#elif defined(__AVX2__)
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
#elif defined(__SSE2__)
  return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)factor);
#else
  return (a & 0xFFFFFFFFu) * factor;
#endif
}

HOST_DEVICE Lanes load(const int64_t* from) { return *reinterpret_cast<const LanesInMemory*>(from); }
HOST_DEVICE void store(int64_t* to, Lanes lanes) { *reinterpret_cast<LanesInMemory*>(to) = lanes; }

typedef uint64_t Row __attribute__((vector_size(32), aligned(8), may_alias));

// Lane i of four columns, side by side, becomes row i.
HOST_DEVICE void transpose(const Lanes (&columns)[4], Row (&rows)[LANES]) {
#if defined(__AVX512F__)
  const auto column = [&](int index) { return (__m512i)columns[index]; };
  const __m512i even[2] = {_mm512_unpacklo_epi64(column(0), column(1)), _mm512_unpacklo_epi64(column(2), column(3))};
  const __m512i odd[2] = {_mm512_unpackhi_epi64(column(0), column(1)), _mm512_unpackhi_epi64(column(2), column(3))};
  const __m512i near = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), far = near + 4;
  const __m512i pairs[4] = {
      _mm512_permutex2var_epi64(even[0], near, even[1]), _mm512_permutex2var_epi64(odd[0], near, odd[1]),
      _mm512_permutex2var_epi64(even[0], far, even[1]), _mm512_permutex2var_epi64(odd[0], far, odd[1])};
#pragma GCC unroll 8
  for (int row = 0; row < LANES; ++row) {
    const __m512i pair = pairs[row / 4 * 2 + row % 2];
    rows[row] = (Row)(row / 2 % 2 == 0 ? _mm512_castsi512_si256(pair) : _mm512_extracti64x4_epi64(pair, 1));
  }
#elif defined(__AVX2__)
  const auto column = [&](int index) { return (__m256i)columns[index]; };
  const __m256i even[2] = {_mm256_unpacklo_epi64(column(0), column(1)), _mm256_unpacklo_epi64(column(2), column(3))};
  const __m256i odd[2] = {_mm256_unpackhi_epi64(column(0), column(1)), _mm256_unpackhi_epi64(column(2), column(3))};
  rows[0] = (Row)_mm256_permute2x128_si256(even[0], even[1], 0x20);
  rows[1] = (Row)_mm256_permute2x128_si256(odd[0], odd[1], 0x20);
  rows[2] = (Row)_mm256_permute2x128_si256(even[0], even[1], 0x31);
  rows[3] = (Row)_mm256_permute2x128_si256(odd[0], odd[1], 0x31);
#else
  for (int row = 0; row < LANES; ++row) {
    rows[row] = Row{columns[0][row], columns[1][row], columns[2][row], columns[3][row]};
  }
#endif
}

// The first `count` lanes of four columns to to + lane * stride.
HOST_DEVICE void store_columns(int64_t* to, int stride, const Lanes (&columns)[4], int count) {
  Row rows[LANES];
  transpose(columns, rows);
  if (count == LANES) {
#pragma GCC unroll 8
    for (int lane = 0; lane < LANES; ++lane) *reinterpret_cast<Row*>(to + lane * stride) = rows[lane];
  } else {
    for (int lane = 0; lane < count; ++lane) *reinterpret_cast<Row*>(to + lane * stride) = rows[lane];
  }
}

// 0, 1, 2, ...
HOST_DEVICE Lanes lane_indices() {
  Lanes indices{};
  for (int lane = 0; lane < LANES; ++lane) indices[lane] = lane;
  return indices;
}

#endif

}  // namespace tensorar
