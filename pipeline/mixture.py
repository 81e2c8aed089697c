"""Whose turn it is in a mixture of shard sets: arithmetic on the position alone, no state.

Invariant: among the first n samples of a run, each part has its share n * weight / (sum of weights) within one sample
for up to three parts and within two for any number, for every n; so any position is found without the ones before it.
The parts are the leaves of a Huffman tree over the weights; each node deals its samples out to its two children, the
rounded share to one and the rest to the other, in exact integers.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from pipeline.philox import Int64Array

_MAX_TOTAL = 2**36
"""Weights are exact up to ten decimals; finer ones are rounded, which moves no share by a sample in 10^11."""


@dataclass(frozen=True, slots=True)
class _Node:
    weight: int
    part: int = -1
    children: tuple[_Node, _Node] | None = None


class Turns(NamedTuple):
    """Whose samples stand in a run of N positions."""

    parts_N: Int64Array
    """The part of each."""
    positions_N: Int64Array
    """Its position in the stream of that part."""


class MixtureSchedule:
    """Deals the positions of a run out to the parts of a mixture by their weights."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Build the tree; `weights` are positive and need not sum to 1."""
        self._root = _tree(_integers(weights))

    def turns(self, first: int, count: int) -> Turns:
        """Return whose samples stand at the positions `[first, first + count)` of the run; O(count * parts)."""
        turns = Turns(np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64))
        _deal(self._root, first, np.arange(count + 1, dtype=np.int64), turns)
        return turns


def _deal(node: _Node, first: int, counts: Int64Array, turns: Turns) -> None:
    """Write the turns of the parts below a node.

    Args:
        node: to deal to.
        first: its samples before the run of positions, a Python integer of any size.
        counts: `(count + 1,)`, its samples in the run before each position and, last, in all of it.
        turns: to write into.
    """
    if node.children is None:
        own = np.flatnonzero(np.diff(counts))
        turns.parts_N[own], turns.positions_N[own] = node.part, first + counts[own]
        return
    left, right = node.children
    share, remainder = divmod(2 * first * left.weight + node.weight, 2 * node.weight)
    counts_left = (remainder + 2 * left.weight * counts) // (2 * node.weight)
    _deal(left, share, counts_left, turns)
    _deal(right, first - share, counts - counts_left, turns)


def _tree(weights: list[int]) -> _Node:
    # The two lightest are joined first: a share then at least halves with every second level, which bounds the sum of
    # the roundings on the way down by two.
    queue = [(weight, part, _Node(weight, part=part)) for part, weight in enumerate(weights)]
    heapq.heapify(queue)
    for number in range(len(weights), 2 * len(weights) - 1):
        (_, _, left), (_, _, right) = heapq.heappop(queue), heapq.heappop(queue)
        weight = left.weight + right.weight
        heapq.heappush(queue, (weight, number, _Node(weight, children=(left, right))))
    return queue[0][2]


def _integers(weights: Sequence[float]) -> list[int]:
    """Return whole numbers in the same proportion as the weights in decimal, with a sum of 2^36 at most."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    total = sum(whole)
    if total <= _MAX_TOTAL:
        return whole
    return [max(1, weight * (_MAX_TOTAL - len(whole)) // total) for weight in whole]
