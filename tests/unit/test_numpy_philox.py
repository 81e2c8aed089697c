"""Philox in numpy: Random123's published vectors, and the properties that the loader builds on."""

import numpy as np
import pytest
import torch

import training.philox as torch_philox
from pipeline.philox import Purpose, permutation, philox4x32, random_words

# Random123, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_words_are_those_of_random123(counter: list[int], key: tuple[int, int], words: list[int]) -> None:
    assert philox4x32(np.array(counter), key=key).tolist() == words


def test_words_equal_those_of_the_torch_version() -> None:
    counters = np.random.default_rng(0).integers(0, 2**32, (50, 4))
    by_torch = torch_philox.philox4x32(torch.from_numpy(counters), torch.tensor([123, 2**31 + 5]))
    assert philox4x32(counters, key=(123, 2**31 + 5)).tolist() == by_torch.tolist()


def test_no_purpose_shares_its_number_with_the_torch_streams() -> None:
    assert {int(purpose) for purpose in Purpose}.isdisjoint(int(purpose) for purpose in torch_philox.Purpose)


def test_every_part_of_the_counter_and_key_changes_the_word() -> None:
    base = {"seed": 1, "purpose": Purpose.VIEW, "stream": 2, "counters": np.array([3])}
    changes = [
        {},
        {"seed": 2},
        {"seed": 1 + 2**32},
        {"purpose": Purpose.SHARD_ORDER},
        {"stream": 3},
        {"stream": 2 + 2**32},
        {"counters": np.array([4])},
        {"counters": np.array([3 + 2**32])},
    ]
    assert len({int(random_words(**(base | change))[0]) for change in changes}) == len(changes)


def test_permutation_holds_every_position_once_and_depends_on_the_first_counter() -> None:
    first = permutation(1000, seed=0, purpose=Purpose.SAMPLE_ORDER, stream=0)
    second = permutation(1000, seed=0, purpose=Purpose.SAMPLE_ORDER, stream=0, first_counter=1000)
    assert sorted(first) == list(range(1000))
    assert first.tolist() != list(range(1000))
    assert first.tolist() != second.tolist()
