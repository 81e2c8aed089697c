"""The kernel of cross_entropy_rows, compiled for the CPU: as in float64, the same bits in any order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from training.build_ops import build_library

BODIES = Path(__file__).parents[1] / "native" / "cross_entropy_bodies.cpp"


@pytest.fixture(scope="module", autouse=True)
def cross_entropy_bodies(tmp_path_factory: pytest.TempPathFactory) -> None:
    library = tmp_path_factory.mktemp("native") / "cross_entropy_bodies.so"
    build_library([BODIES], library)
    torch.ops.load_library(library)


def problem(num_rows: int, codebook_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(codebook_size)
    logits = (torch.randn(num_rows, codebook_size) * 4).to(dtype)
    return logits, torch.randint(codebook_size, (num_rows,)), torch.rand(num_rows)


def run(
    logits: Tensor, targets: Tensor, row_weights: Tensor, *, seed: int = 0, needs_grad: bool = True
) -> list[Tensor]:
    """Entropies, hits, and what the logits become."""
    kept = logits.clone()
    entropies, hits = torch.ops.tensorar_cross_entropy_bodies.cross_entropy_rows(
        kept, targets, row_weights, needs_grad, seed
    )
    return [entropies, hits, kept]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codebook_size", [1, 7, 8, 37, 2048, 5000, 16384])
def test_entropies_and_gradients_are_those_of_float64(codebook_size: int, dtype: torch.dtype) -> None:
    logits, targets, row_weights = problem(5, codebook_size, dtype)
    entropies, hits, grad = run(logits, targets, row_weights)
    leaf = logits.double().requires_grad_()
    wanted = F.cross_entropy(leaf, targets, reduction="none")
    (wanted_grad,) = torch.autograd.grad((wanted * row_weights).sum(), leaf)
    torch.testing.assert_close(entropies.double(), wanted.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-5 if dtype == torch.float32 else 2.0**-8, atol=1e-7)
    firsts = [row.index(max(row)) for row in logits.tolist()]
    assert hits.tolist() == [first == target for first, target in zip(firsts, targets.tolist(), strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_blocks_and_threads_does_not_show(dtype: torch.dtype) -> None:
    given = problem(6, 3000, dtype)
    want = run(*given)
    for seed in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(want, run(*given, seed=seed), strict=True))


def test_the_first_of_equal_logits_is_the_top_one() -> None:
    logits = torch.zeros(4, 3000)
    logits[1, [2999, 17, 5]] = 1.0
    logits[2, [2047, 2048]] = 3.0
    logits[3, 256 * 8 :] = 2.0
    _, hits, _ = run(logits, torch.tensor([0, 5, 2047, 2048]), torch.ones(4))
    assert hits.tolist() == [True] * 4
    assert run(logits, torch.tensor([1, 17, 2048, 2049]), torch.ones(4))[1].tolist() == [False] * 4


def test_a_code_that_cannot_be_has_no_share() -> None:
    logits = torch.full((2, 4096), float("-inf"))
    logits[0, 4000], logits[0, 3] = 1.0, 1.0
    logits[1, 0] = -5.0
    entropies, _, grad = run(logits, torch.tensor([3, 0]), torch.ones(2))
    torch.testing.assert_close(entropies, torch.tensor([2.0, 1.0]).log())
    assert grad[0].nonzero().flatten().tolist() == [3, 4000]
    assert float(grad[1].abs().max()) == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_makes_the_entropy_so(bad: float) -> None:
    for place in (0, 5, 2047, 2999):
        logits, targets, row_weights = problem(3, 3000, torch.float32)
        logits[1, place] = bad
        entropies, *_ = run(logits, targets, row_weights)
        assert entropies.isfinite().tolist() == [True, False, True]


def test_logits_stay_where_no_gradient_is_needed() -> None:
    logits, targets, row_weights = problem(3, 64, torch.bfloat16)
    entropies, hits, kept = run(logits, targets, row_weights, needs_grad=False)
    assert torch.equal(kept, logits)
    assert all(torch.equal(a, b) for a, b in zip(run(logits, targets, row_weights)[:2], (entropies, hits), strict=True))


def test_a_row_weight_of_none_gives_a_gradient_of_zero() -> None:
    logits, targets, _ = problem(2, 500, torch.float32)
    assert float(run(logits, targets, torch.zeros(2))[2].abs().max()) == 0.0


def test_what_the_kernel_cannot_read_is_refused() -> None:
    logits, targets, row_weights = problem(3, 64, torch.float32)
    with pytest.raises(RuntimeError, match=r"targets must be contiguous int64 of shape \(3,\)"):
        run(logits, targets.int(), row_weights)
    with pytest.raises(RuntimeError, match=r"row_weights must be contiguous float32 of shape \(3,\)"):
        run(logits, targets, row_weights[:2])
    with pytest.raises(RuntimeError, match="logits must be contiguous float32 or bfloat16"):
        run(logits.double(), targets, row_weights)
    for target in (-1, 64):
        with pytest.raises(RuntimeError, match=rf"targets must be in \[0, 64\), got {target}"):
            run(logits, torch.tensor([0, target, 0]), row_weights)
