"""Counter-based random words: Philox4x32-10 in plain torch int64, bit equal to Random123 on every device.

Every draw of training and sampling is a pure function of (seed, purpose, sample, step, cell), so it does not depend on
batch composition, world size, device or resume. A purpose owns its stream: two never share a counter and key.

Counter words: sample bits 0..31, sample bits 32..63, step, cell. Key words: seed bits 0..31, then purpose in bits 0..7
and seed bits 32..55 above it. int64 arithmetic costs twice the memory of uint32, which torch cannot multiply.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
"""Mask of one 32-bit word."""
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MAX_SEED_BITS = 56
MAX_CELL_BITS = 16


class Purpose(IntEnum):
    """What a stream of draws is for; the number enters the key, so it must never be reused."""

    NOISE_INDEPENDENT = 1
    """Step = training step; cell = (position, offset)."""
    NOISE_SHARED = 2
    """Step = training step; cell = (position of the code, 0)."""
    OWN_DRAFTS = 3
    """Step = training step; cell = (position of the window, offset)."""
    LABEL_DROPOUT = 4
    """Step = training step; cell = 0."""
    SAMPLING = 5
    """Step = offset of the prediction, 0 for finals and coupled drafts; cell = (position of the code, code // 4)."""
    SCORED_PHASES = 6
    """Step = training step; cell = (0, offset)."""


def philox4x32(counters: Tensor, keys: Tensor) -> Tensor:
    """Ten rounds of Philox4x32.

    Args:
        counters: (..., 4) int64, words in [0, 2**32).
        keys: (..., 2) int64, words in [0, 2**32); broadcasts against the counters' leading dimensions.

    Returns:
        (..., 4) int64, words in [0, 2**32).

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    return torch.stack(_rounds(counters.unbind(-1), keys.unbind(-1)), dim=-1)


def draw_words(
    purpose: Purpose, *, seed: int, samples: Tensor, step: int | Tensor, cells: Tensor
) -> tuple[Tensor, ...]:
    """Four independent random words per counter.

    Args:
        purpose: which stream.
        seed: in [0, 2**56).
        samples: int64 >= 0, the sample counters.
        step: in [0, 2**32); a number, or int64 that broadcasts with the rest.
        cells: int64 in [0, 2**32), see `cell_of`; broadcasts with `samples`.

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).

    Raises:
        ValueError: the seed is out of range.
    """
    if not 0 <= seed < 1 << MAX_SEED_BITS:
        raise ValueError(
            f"draw {purpose.name.lower()}: seed must be in [0, 2**{MAX_SEED_BITS}), got {seed}; use a smaller one"
        )
    keys = (seed & WORD, int(purpose) | (seed >> 32) << 8)
    steps = step if isinstance(step, Tensor) else torch.tensor(step, dtype=torch.int64, device=samples.device)
    return _rounds((samples & WORD, (samples >> 32) & WORD, steps, cells), keys)  # broadcasts in its first rounds


def cell_of(major: Tensor, minor: Tensor) -> Tensor:
    """A counter word of two places, `major * 2**16 + minor`.

    Args:
        major: int64 in [0, 2**16).
        minor: int64 in [0, 2**16); broadcasts.
    """
    return (major << MAX_CELL_BITS) | minor


def unit_interval(words: Tensor) -> Tensor:
    """Random words as float32 strictly inside (0, 1): `(top 23 bits + 0.5) / 2**23`, exact in float32."""
    return ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23


def _rounds(counters: tuple[Tensor, ...], keys: tuple[Tensor, ...] | tuple[int, ...]) -> tuple[Tensor, ...]:
    c0, c1, c2, c3 = counters
    k0, k1 = keys
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # wrap modulo 2**64: the bits are right
        c0, c1 = _mixed(product1 >> 32, c1, k0), product1
        c2, c3 = _mixed(product0 >> 32, c3, k1), product0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def _mixed(high: Tensor, word: Tensor, key: Tensor | int) -> Tensor:
    """The low words of all three, joined; what is above them is leftovers."""
    if high.shape != word.shape or isinstance(key, Tensor):
        return (high ^ word ^ key) & WORD
    return high.bitwise_xor_(word).bitwise_xor_(key).bitwise_and_(WORD)
