"""Whose turn it is in a mixture: shares, order and resume points, by counting."""

from fractions import Fraction
from itertools import pairwise
from math import floor
from typing import Any

import numpy as np
import pytest

from pipeline.mixture import MixtureSchedule

WEIGHTS = [
    (1.0,),
    (1.0, 1.0),
    (0.7, 0.3),
    (3.0, 1.0),
    (0.7, 0.2, 0.1),
    (1.0, 1.0, 1.0),
    (2.0, 1.0, 1.0),
    (1 / 3, 2 / 3, 0.0001),
    (0.9, 0.05, 0.03, 0.02),
    (1, 1, 2, 3, 5, 8, 13, 21),
    tuple(float(n) for n in range(1, 18)),
    (123456.789, 1e-3, 0.1),
]


def turns_of(weights: tuple[float, ...], first: int, count: int) -> list[tuple[int, int]]:
    turns = MixtureSchedule(weights).turns(first, count)
    return list(zip(turns.parts_N.tolist(), turns.positions_N.tolist(), strict=True))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_holds_the_share_of_each_part(weights: tuple[float, ...]) -> None:
    count = 20_000
    parts = MixtureSchedule(weights).turns(0, count).parts_N
    bound = 1.0 if len(weights) <= 3 else 2.0
    for part, weight in enumerate(weights):
        taken = np.cumsum(parts == part)
        wanted = np.arange(1, count + 1) * (weight / sum(weights))
        assert np.abs(taken - wanted).max() <= bound + 1e-6


@pytest.mark.parametrize("weights", WEIGHTS)
def test_each_part_is_read_position_by_position(weights: tuple[float, ...]) -> None:
    turns = turns_of(weights, 0, 3_000)
    for part in range(len(weights)):
        positions = [position for own, position in turns if own == part]
        assert positions == list(range(len(positions)))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_turns_from_any_position_are_those_of_the_whole(weights: tuple[float, ...]) -> None:
    whole = turns_of(weights, 0, 300)
    for first in range(300):
        assert turns_of(weights, first, 300 - first) == whole[first:]


@pytest.mark.parametrize("first", [10**9 + 7, 10**12 + 1, 2**50])
def test_shares_hold_far_into_a_run(first: int) -> None:
    turns = MixtureSchedule((0.7, 0.2, 0.1)).turns(first, 1000)
    for part, tenths in enumerate((7, 2, 1)):
        before = turns.positions_N[turns.parts_N == part][0]
        assert abs(int(before) * 10 - first * tenths) <= 10 * 10  # its first turn may be some samples after `first`
        assert abs(int((turns.parts_N == part).sum()) - 100 * tenths) <= 2


def parts_by_hand(weights: tuple[int, ...], count: int) -> list[int]:
    """The first `count` turns by the documented rule: the two lightest are joined, each node's share is rounded."""
    nodes: list[tuple[int, int, Any]] = [(weight, number, number) for number, weight in enumerate(weights)]
    while len(nodes) > 1:
        first, second, *others = sorted(nodes, key=lambda node: node[:2])
        number = 2 * len(weights) - len(nodes)
        nodes = [*others, (first[0] + second[0], number, (first, second))]

    def samples_of_part(node: tuple[int, int, Any], num_samples: int) -> dict[int, int]:
        weight, _, below = node
        if isinstance(below, int):
            return {below: num_samples}
        first, second = below
        share = floor(Fraction(num_samples * first[0], weight) + Fraction(1, 2))
        return samples_of_part(first, share) | samples_of_part(second, num_samples - share)

    taken = [samples_of_part(nodes[0], num_samples) for num_samples in range(count + 1)]
    return [next(part for part in before if after[part] > before[part]) for before, after in pairwise(taken)]


@pytest.mark.parametrize("weights", [(7, 2, 1), (2, 1, 1), (1, 1, 1, 1, 1), (2, 3, 5, 2, 3, 5), (1, 2, 3, 4, 5, 6, 7)])
def test_turns_are_those_of_the_documented_tree(weights: tuple[int, ...]) -> None:
    assert [part for part, _ in turns_of(weights, 0, 400)] == parts_by_hand(weights, 400)


def test_parts_take_turns() -> None:
    assert [part for part, _ in turns_of((1.0, 1.0), 0, 6)] in ([0, 1] * 3, [1, 0] * 3)
    parts = [part for part, _ in turns_of((3.0, 1.0), 0, 40)]
    rare = [place for place, part in enumerate(parts) if part == 1]
    assert {after - before for before, after in pairwise(rare)} == {4}


def test_weights_count_only_beside_each_other() -> None:
    for first in (0, 2**50):
        wanted = turns_of((7.0, 2.0, 1.0), first, 500)
        assert turns_of((0.7, 0.2, 0.1), first, 500) == turns_of((7e15, 2e15, 1e15), first, 500) == wanted


def test_the_lightest_part_has_turns_too() -> None:
    ((_, position),) = [turn for turn in turns_of((1.0, 1e-15), 2**37 + 1, 2) if turn[0] == 0][:1]
    assert 2**37 + 1 - position in (1, 2, 3)  # of the other part before it, whose weight is rounded up to 2**-36
