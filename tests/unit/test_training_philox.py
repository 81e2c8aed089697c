"""Philox4x32-10: Random123's own vectors, the numpy twin, and uniform words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.philox import philox4x32 as numpy_philox4x32
from training.philox import Purpose, cell_of, draw_words, philox4x32, unit_interval

RANDOM123_VECTORS = [  # counter, key, words: kat_vectors of Random123
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), RANDOM123_VECTORS)
def test_words_are_random123s(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    assert philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == list(words)


def test_words_equal_the_loaders_numpy_words() -> None:
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, (50, 4))
    key = (0xDEADBEEF, 0x12345678)
    ours = philox4x32(torch.from_numpy(counters), torch.tensor(key))
    assert np.array_equal(ours.numpy(), numpy_philox4x32(counters, key=key).astype(np.int64))


def test_draw_words_lays_out_counter_and_key_as_documented() -> None:
    seed, sample, step, cell = (0xABCDEF << 32) | 0x01234567, (9 << 32) | 7, 11, (3 << 16) | 2
    words = draw_words(
        Purpose.OWN_DRAFTS,
        seed=seed,
        samples=torch.tensor(sample),
        step=step,
        cells=cell_of(torch.tensor(3), torch.tensor(2)),
    )
    counter, key = torch.tensor([7, 9, step, cell]), torch.tensor([0x01234567, 3 | 0xABCDEF << 8])
    assert [int(word) for word in words] == philox4x32(counter, key).tolist()


def test_two_purposes_never_share_words() -> None:
    samples = torch.arange(1000)
    streams = [draw_words(purpose, seed=0, samples=samples, step=0, cells=samples * 0)[0] for purpose in Purpose]
    for index, stream in enumerate(streams):
        for other in streams[:index]:
            assert int((stream == other).sum()) == 0


@pytest.mark.parametrize("seed", [-1, 2**56])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*56\)"):
        draw_words(Purpose.SAMPLING, seed=seed, samples=torch.tensor(0), step=0, cells=torch.tensor(0))


def test_unit_interval_never_reaches_its_ends() -> None:
    values = unit_interval(torch.tensor([0, 2**31, 2**32 - 1]))
    assert values.dtype == torch.float32
    assert values.tolist() == [2.0**-24, 0.5 + 2.0**-24, 1 - 2.0**-24]
