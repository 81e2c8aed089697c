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

// The keys of the ten rounds, in memory: the kernels use them from there.
struct PhiloxKeys {
  uint64_t words[10][2];

  PhiloxKeys() = default;
  explicit PhiloxKeys(uint32_t key0, uint32_t key1) {
    for (auto& round : words) {
      round[0] = key0;
      round[1] = key1;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
  }
};

template <class Word>
struct PhiloxWords {
  Word words[4];
};

// The four random words of a counter, with leftovers in their high halves. A counter word that all lanes share is given
// as a scalar and stays one, through the first rounds, until it meets one that they do not share.
template <int ROUND = 0, class Word0, class Word1, class Word2, class Word3>
HOST_DEVICE auto philox4x32(Word0 word0, Word1 word1, Word2 word2, Word3 word3, const PhiloxKeys& keys) {
  if constexpr (ROUND == 10) {
    return PhiloxWords<Word0>{{word0, word1, word2, word3}};
  } else {
    const auto product0 = multiply(word0, 0xD2511F53u);
    const auto product1 = multiply(word2, 0xCD9E8D57u);
    const auto* key = keys.words[ROUND];
    return philox4x32<ROUND + 1>((product1 >> 32) ^ (word1 ^ key[0]), product1, (product0 >> 32) ^ (word3 ^ key[1]),
                                 product0, keys);
  }
}

}  // namespace tensorar
