// Philox4x32-10 for every kernel: of one word, or of one word a SIMD lane; on the host and on CUDA devices.
//
// What the counters and keys are is told in training/philox.py. Source: Salmon et al. 2011, "Parallel random numbers:
// as easy as 1, 2, 3".
#pragma once

#include "lanes.h"

namespace tensorar {

// The word without the leftovers above it.
template <class Word>
HOST_DEVICE Word low_half(Word word) {
  return word & 0xFFFFFFFFu;
}

// Ten rounds; overwrites the counter with the four random words, which have leftovers in their high halves.
template <class Word>
HOST_DEVICE void philox4x32(Word (&counter)[4], uint32_t key0, uint32_t key1) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    const Word product0 = multiply(counter[0], 0xD2511F53u), product1 = multiply(counter[2], 0xCD9E8D57u);
    counter[0] = (product1 >> 32) ^ counter[1] ^ key0;
    counter[2] = (product0 >> 32) ^ counter[3] ^ key1;
    counter[1] = product1;
    counter[3] = product0;
  }
}

}  // namespace tensorar
