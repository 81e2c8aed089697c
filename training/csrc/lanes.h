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

// 0, 1, 2, ...
HOST_DEVICE Lanes lane_indices() {
  Lanes indices{};
  for (int lane = 0; lane < LANES; ++lane) indices[lane] = lane;
  return indices;
}

#endif

}  // namespace tensorar
