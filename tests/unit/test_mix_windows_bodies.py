"""The kernels that mix_windows runs on CUDA, compiled for the CPU: as in float64, the same bits in any order.

Float64 is written out here, window by window. Bounds are of the largest number of a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from training.build_ops import build_library
from training.config import ModelConfig
from training.ops import load_ops

BODIES = Path(__file__).parents[1] / "native" / "mix_windows_bodies.cpp"
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # half a last place of bfloat16 is 2e-3
Array = npt.NDArray[np.float64]


@pytest.fixture(scope="module", autouse=True)
def mix_bodies(tmp_path_factory: pytest.TempPathFactory) -> None:
    library = tmp_path_factory.mktemp("native") / "mix_windows_bodies.so"
    build_library([BODIES], library)
    torch.ops.load_library(library)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    codes: Tensor
    table: Tensor
    offsets: Tensor
    score_weight: Tensor
    grad: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.codes, self.table, self.offsets, self.score_weight


def inputs(shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32) -> Inputs:
    windows, size, heads, dim, codebook_size = shape
    torch.manual_seed(windows + size + dim)
    codes = torch.randint(codebook_size, (windows, size))
    codes[::3, 1 + size // 2 :] = -1
    return Inputs(
        codes=codes,
        table=torch.randn(codebook_size, dim).to(dtype),
        offsets=torch.randn(size, dim),
        score_weight=torch.randn(heads, dim) * 1.5 / dim**0.5,
        grad=torch.randn(windows, heads, dim).to(dtype),
    )


def run(given: Inputs, *, seed: int = 0) -> list[Tensor]:
    """Mixed vectors, shares, and what is added to gradients of one: table's, offsets', score weight's."""
    ops = torch.ops.tensorar_mix_bodies
    mixed, shares = ops.mix_windows(*given.tensors, seed)
    sums = [torch.ones_like(weight, dtype=torch.float32) for weight in given.tensors[1:]]
    ops.mix_windows_backward(given.grad, shares, *given.tensors, *sums, seed)
    return [mixed, shares, *sums]


def brute_force(given: Inputs) -> list[Array]:
    """What `run` returns, in float64 and from the formulas: keys, softmax, weighted sum, and their derivatives."""
    table, offsets, weight, grads = (
        tensor.double().numpy() for tensor in (given.table, given.offsets, given.score_weight, given.grad)
    )
    mixed, shares = np.zeros(grads.shape), np.zeros((*grads.shape[:2], len(offsets)))
    sums = [np.ones_like(array) for array in (table, offsets, weight)]
    for m, codes in enumerate(given.codes.numpy()):
        places = np.flatnonzero(codes >= 0)
        if not len(places):
            continue
        rows = table[codes[places]] + offsets[places]
        factors = 1 / np.sqrt((rows**2).mean(1, keepdims=True) + 1e-5)
        keys = rows * factors
        scores = weight @ keys.T
        of_window = np.exp(scores - scores.max(1, keepdims=True))
        of_window /= of_window.sum(1, keepdims=True)
        shares[m][:, places], mixed[m] = of_window, of_window @ keys
        share_grads = grads[m] @ keys.T
        score_grads = of_window * (share_grads - (of_window * share_grads).sum(1, keepdims=True))
        key_grads = of_window.T @ grads[m] + score_grads.T @ weight
        row_grads = factors * (key_grads - keys * (keys * key_grads).mean(1, keepdims=True))
        np.add.at(sums[0], codes[places], row_grads)
        sums[1][places] += row_grads
        sums[2] += score_grads @ keys
    return [mixed, shares, *sums]


SHAPES = [  # windows, window_size, heads, dim, codebook_size
    (1, 1, 1, 16, 1),
    (37, 5, 3, 24, 50),  # offsets that fill no tile, a last block of one window
    (21, 3, 5, 20, 9),  # rows of bfloat16 that start on no 16 bytes
    (6, 2, 2, 7, 5),  # rows that end within a load
    (33, 8, 7, 112, 90),
    (5, 4, 3, 36, 11),  # rows of float32 with an odd number of 16 bytes
    (3, 8, 5, 300, 11),
    (150, 4, 4, 64, 20),  # more parts than stripes
    (7, 9, 33, 48, 8),  # more heads than a block of the score weight's gradient
    (5, 4, 2, 768, 6),  # four windows a block
    (5, 4, 2, 1280, 6),  # two
    (3, 4, 1, 3200, 6),  # one
    (2, 70, 1, 264, 90),  # more sums over rows than dot products
]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_formulas_in_float64(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    given = inputs(shape, dtype)
    for index, (actual, wanted) in enumerate(zip(run(given), brute_force(given), strict=True)):
        bound = BOUNDS[dtype] if index == 0 else BOUNDS[torch.float32]
        assert np.abs(actual.double().numpy() - wanted).max() <= bound * np.abs(wanted).max(), index


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[5], SHAPES[7], SHAPES[9]])
def test_blocks_and_threads_in_any_order_give_the_same_bits(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    given = inputs(shape, dtype)
    ascending = run(given)
    for seed in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(ascending, run(given, seed=seed), strict=True))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("first_dim", range(1, 9))
def test_rows_of_any_length_are_mixed_as_in_float64(first_dim: int, dtype: torch.dtype) -> None:
    for dim in range(first_dim, 150, 8):
        given = inputs((5, 4, 3, dim, 7), dtype)
        for index, (actual, wanted) in enumerate(zip(run(given), brute_force(given), strict=True)):
            bound = BOUNDS[dtype] if index == 0 else BOUNDS[torch.float32]
            assert np.abs(actual.double().numpy() - wanted).max() <= bound * np.abs(wanted).max(), (dim, index)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_slices_that_start_on_no_16_bytes_give_the_bits_of_those_that_do(dtype: torch.dtype) -> None:
    given = inputs((37, 4, 3, 64, 50), dtype)

    def shifted(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    names = ("codes", "table", "offsets", "score_weight", "grad")
    moved = Inputs(**{name: shifted(getattr(given, name)) for name in names})
    assert moved.table.data_ptr() % 16 != 0
    assert all(torch.equal(a, b) for a, b in zip(run(given), run(moved), strict=True))


def test_a_window_gives_the_same_bits_alone_and_among_others() -> None:
    given = inputs((9, 4, 3, 64, 50))
    together, _ = torch.ops.tensorar_mix_bodies.mix_windows(*given.tensors, 0)
    for m in range(9):
        alone, _ = torch.ops.tensorar_mix_bodies.mix_windows(given.codes[m : m + 1], *given.tensors[1:], 0)
        assert torch.equal(alone[0], together[m])


def test_the_cpus_own_kernel_computes_the_same() -> None:
    load_ops()
    given = inputs((150, 4, 6, 48, 30))
    sums = [torch.ones_like(weight) for weight in given.tensors[1:]]
    mixed, shares = torch.ops.tensorar.mix_windows(*given.tensors)
    torch.ops.tensorar.mix_windows_backward(given.grad, shares, *given.tensors, *sums)
    for native, body in zip([mixed, shares, *sums], run(given), strict=True):
        assert (body - native).abs().max() <= 2 * BOUNDS[torch.float32] * native.abs().max()


def test_a_window_of_no_code_gives_zeros_and_takes_no_gradient() -> None:
    given = inputs((10, 4, 3, 64, 50))
    given.codes[3] = given.codes[9] = -1
    given.grad[3] = float("inf")
    mixed, shares, *sums = run(given)
    assert not mixed[[3, 9]].any()
    assert not shares[[3, 9]].any()
    given.grad[3] = 0
    for actual, wanted in zip(sums, brute_force(given)[2:], strict=True):
        np.testing.assert_allclose(actual.numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_what_is_not_attended_to_is_not_read() -> None:
    given = inputs((10, 4, 3, 64, 50))
    given.codes[given.codes == 0] = 1
    want = run(given)
    given.table[0] = float("nan")
    assert all(torch.equal(a, b) for a, b in zip(want, run(given), strict=True))


def test_a_number_that_is_none_is_not_hidden() -> None:
    given = inputs((2, 4, 3, 64, 50))
    given.codes[1] = torch.tensor([3, 4, 5, 6])
    given.table[4] = float("nan")
    mixed, shares, *_ = run(given)
    assert mixed[1].isnan().all()
    assert shares[1].isnan().all()


def test_no_window_is_no_work() -> None:
    given = inputs((0, 4, 3, 64, 50))
    mixed, shares, *sums = run(given)
    assert (mixed.shape, shares.shape) == ((0, 3, 64), (0, 3, 4))
    assert all(bool((total == 1).all()) for total in sums)


def test_a_code_beyond_the_table_is_refused() -> None:
    given = inputs((2, 4, 3, 64, 50))
    given.codes[1, 0] = 50
    with pytest.raises(RuntimeError, match=r"codes must be below the table's 50 rows, got 50"):
        run(given)


@pytest.mark.parametrize(
    ("size", "window_size", "num_bytes"),
    [  # the first by hand: 16 rows of 768, 128 sums of 36 partials, 3 numbers a row, 2 a row and head of 12
        ("B", 4, 4 * (16 * 768 + 128 * 36 + 3 * 16 + 2 * 16 * 12)),
        ("L", 4, 86_208),
        ("XL", 4, 60_768),
        ("XXL", 4, 69_216),
        ("3B", 4, 70_704),
        ("3B", 8, 122_976),
    ],
)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_block_of_every_size_fits_the_shared_memory_of_a_device(
    size: Any, window_size: int, num_bytes: int, dtype: torch.dtype
) -> None:
    config = ModelConfig(size=size, window_size=window_size)
    given = inputs((1, window_size, config.heads, config.dim, 1), dtype)
    assert torch.ops.tensorar_mix_bodies.shared_bytes(*given.tensors) == num_bytes <= 163 * 1024  # of compute 8.0
