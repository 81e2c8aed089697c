"""The bodies of the CUDA kernels, compiled for the CPU: bit equal to the references, whatever order blocks run in."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from training.build_ops import build_library
from training.noise import noise_windows
from training.philox import Purpose, draw_words

BODIES = Path(__file__).parents[1] / "native" / "cuda_bodies.cpp"
ELEMENTS_PER_BLOCK, THREADS = 2048, 256


@pytest.fixture(scope="module", autouse=True)
def cuda_bodies(tmp_path_factory: pytest.TempPathFactory) -> None:
    library = tmp_path_factory.mktemp("native") / "cuda_bodies.so"
    build_library([BODIES], library)
    torch.ops.load_library(library)


@pytest.mark.parametrize("coupling", ["independent", "shared"])
@pytest.mark.parametrize(
    ("batch", "positions", "window_size"),
    [
        (2, 256, 4),  # whole blocks
        (3, 64, 8),
        (1, 1, 1),
        (5, 1, 3),  # every window hangs over the end
        (3, 7, 5),  # an odd number of codes and of elements
        (1, 2049, 1),
        (683, 1, 3),  # one element in the second block
        (3, 683, 3),
        (1, 100, 100),
        (2, 300, 256),  # the largest window
        (1, 2**15, 1),  # the most positions
    ],
)
def test_the_noise_body_is_the_reference_in_any_order(
    batch: int, positions: int, window_size: int, coupling: Any
) -> None:
    random.seed(batch * positions * window_size)
    codes = torch.randint(0, 1000, (batch, positions))
    counters = torch.randint(0, 2**62, (batch,))
    betas = (0.0, *(random.choice([0.0, 0.3, 0.8, 1.0]) for _ in range(window_size - 1)))
    blocks = list(range(-(-batch * positions * window_size // ELEMENTS_PER_BLOCK)))
    threads = list(range(THREADS))
    random.shuffle(blocks)
    random.shuffle(threads)
    got = torch.ops.tensorar_cuda_bodies.noise_windows(
        codes, counters, [int(beta * 2**32) for beta in betas], 1000, coupling, 2**55 + 3, 2**31 + 7, blocks, threads
    )
    want = noise_windows(
        codes,
        betas=betas,
        codebook_size=1000,
        coupling=coupling,
        seed=2**55 + 3,
        step=2**31 + 7,
        sample_counters_B=counters,
    )
    assert torch.equal(got, want)


def test_the_noise_body_replaces_from_the_very_threshold_of_a_word_on() -> None:
    cell = torch.tensor(1)
    chance, choice, *_ = draw_words(Purpose.NOISE_INDEPENDENT, seed=3, samples=torch.tensor(5), step=7, cells=cell)
    for threshold, expected in ((int(chance), 99), (int(chance) + 1, int(choice) * 50 >> 32)):
        windows = torch.ops.tensorar_cuda_bodies.noise_windows(
            torch.full((1, 2), 99),
            torch.tensor([5]),
            [0, threshold],
            50,
            "independent",
            3,
            7,
            [0],
            list(range(THREADS)),
        )
        assert int(windows[0, 0, 1]) == expected
