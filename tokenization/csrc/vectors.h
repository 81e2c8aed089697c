// What GCC and clang spell differently of vectors, and the rows of pixels that both files here work on.
#pragma once

#include <stdint.h>

// Always inlined: else the linker could keep a copy that was compiled for another instruction set.
#define ALWAYS_INLINE inline __attribute__((always_inline))

// The elements of two vectors, side by side, at constant places.
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a){__VA_ARGS__})
#endif

typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint8_t Bytes16InMemory __attribute__((vector_size(16), aligned(1), may_alias));

namespace tensorar {

static ALWAYS_INLINE Bytes16 load_bytes(const uint8_t* from) { return *reinterpret_cast<const Bytes16InMemory*>(from); }
static ALWAYS_INLINE void store_bytes(uint8_t* to, Bytes16 bytes) { *reinterpret_cast<Bytes16InMemory*>(to) = bytes; }

}  // namespace tensorar
