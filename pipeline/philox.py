"""Philox4x32-10 in numpy: random 32-bit words as a pure function of a counter and a key (Salmon et al., SC 2011).

Everything the loader draws (orders, views) comes from here, so a draw depends on (seed, purpose, counter) and on
nothing else: no state to save, the same on any machine, world size or resume. Bit-exact with Random123's test
vectors; about 40 ns per word, which is nothing beside reading a sample.
"""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt

UInt32Array = npt.NDArray[np.uint32]
UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_ROUNDS = 10


class Purpose(enum.IntEnum):
    """What a draw is for, part of the key, so that two purposes never share a stream.

    Numbers below 0x10 belong to `training.philox`, which lays its key out in the same way.
    """

    SHARD_ORDER = 0x10
    SAMPLE_ORDER = 0x11
    VIEW = 0x12
    OWN_DRAFT_STEPS = 0x13
    DROPOUT = 0x14
    REPLACEMENT = 0x15
    BETA_JITTER = 0x16
    RESAMPLE = 0x17


def philox4x32(counters: npt.NDArray[np.integer], *, key: tuple[int, int]) -> UInt32Array:
    """Return the four random words of every counter.

    Args:
        counters: `(..., 4)` integers in [0, 2^32), least significant word first.
        key: two integers in [0, 2^32).

    Returns:
        `(..., 4)` uint32.
    """
    c0, c1, c2, c3 = (np.asarray(counters[..., word]).astype(np.uint64) for word in range(4))
    for round_index in range(_ROUNDS):
        k0, k1 = (np.uint64((key[i] + round_index * _KEY_STEPS[i]) & 0xFFFFFFFF) for i in range(2))
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (product1 >> _HIGH) ^ c1 ^ k0, product1 & _LOW, (product0 >> _HIGH) ^ c3 ^ k1, product0 & _LOW
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def random_words(*, seed: int, purpose: Purpose, stream: int | Int64Array, counters: Int64Array) -> UInt64Array:
    """Return one random 64-bit word per counter.

    Args:
        seed: in [0, 2^56); bits 0..31 are the first key word, the rest stands above the purpose in the second.
        purpose: bits 0..7 of the second key word.
        stream: in [0, 2^64), e.g. the epoch, or one of each counter; the upper two counter words.
        counters: `(N,)` in [0, 2^63); the lower two counter words.

    Returns:
        `(N,)` uint64, uniform over all 64-bit values.
    """
    low = counters.astype(np.uint64)
    block = np.empty((*low.shape, 4), dtype=np.uint64)
    block[..., 0], block[..., 1] = low & _LOW, low >> _HIGH
    block[..., 2], block[..., 3] = stream & 0xFFFFFFFF, stream >> 32
    words = philox4x32(block, key=(seed & 0xFFFFFFFF, int(purpose) | (seed >> 32) << 8)).astype(np.uint64)
    return words[..., 0] | (words[..., 1] << _HIGH)


def permutation(count: int, *, seed: int, purpose: Purpose, stream: int, first_counter: int = 0) -> Int64Array:
    """Return a random order of `0..count-1`: the stable sort order of one word per position.

    Args:
        count: positions to order.
        seed: see `random_words`.
        purpose: see `random_words`.
        stream: see `random_words`.
        first_counter: counter of position 0; disjoint ranges give independent orders.
    """
    if count == 1:  # small sets have many epochs in a batch, and each its orders
        return np.zeros(1, dtype=np.int64)
    counters = np.arange(first_counter, first_counter + count, dtype=np.int64)
    words = random_words(seed=seed, purpose=purpose, stream=stream, counters=counters)
    return np.argsort(words, kind="stable").astype(np.int64)
