"""Cross-entropy of a head on a CUDA device: the native rows against float64, the same bits each time, less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from training import cross_entropy
from training.cross_entropy import head_cross_entropy
from training.ops import cross_entropy_rows, load_ops

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _native_ops() -> None:
    load_ops()


def _rows(num_rows: int, codebook_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(codebook_size)
    logits = (torch.randn(num_rows, codebook_size) * 4).to(dtype).cuda()
    return logits, torch.randint(codebook_size, (num_rows,)).cuda(), torch.rand(num_rows).cuda()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook_size", [1, 7, 37, 2048, 5001, 16384, 2**18])
def test_rows_are_those_of_float64(codebook_size: int, dtype: torch.dtype) -> None:
    logits, targets, row_weights = _rows(301, codebook_size, dtype)
    leaf = logits.double().requires_grad_()
    wanted = F.cross_entropy(leaf, targets, reduction="none")
    (wanted_grad,) = torch.autograd.grad((wanted * row_weights).sum(), leaf)
    entropies, hits = cross_entropy_rows(logits, targets, row_weights_R=row_weights, needs_grad=True)
    torch.testing.assert_close(entropies.double(), wanted.detach(), rtol=2e-6, atol=4e-6)
    rounding = 1e-5 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(logits.double(), wanted_grad, rtol=rounding, atol=1e-6)
    wide = leaf.detach()
    firsts = (wide == wide.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(hits, firsts == targets)


def _problem(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    states = torch.randn(3000, 256, device="cuda", dtype=dtype, requires_grad=True)
    weight = (torch.randn(16384, 256, device="cuda") / 8).to(dtype).requires_grad_()
    targets = torch.randint(16384, (3000,), device="cuda")
    return {"states": states, "weight_VD": weight, "targets": targets, "row_weights": torch.rand(3000, device="cuda")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_and_reference_agree_in_loss_and_gradients(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(cross_entropy, "ACCELERATOR_CHUNK_BYTES", 700 * 16384 * 6)
    problem = _problem(dtype)
    leaves = (problem["states"], problem["weight_VD"])
    results = []
    for ops in ("native", "reference"):
        got = head_cross_entropy(**problem, ops=ops)  # type: ignore[arg-type]
        results.append([got.loss, got.entropies, *torch.autograd.grad(got.loss, leaves)])
    for native, reference in zip(*results, strict=True):
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        assert (native - reference).abs().max() <= bound * reference.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_each_time(dtype: torch.dtype) -> None:
    problem = _problem(dtype)

    def take() -> list[Tensor]:
        got = head_cross_entropy(**problem, ops="native")
        return [got.loss, got.hits, *torch.autograd.grad(got.loss, (problem["states"], problem["weight_VD"]))]

    first = take()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, take(), strict=True))


def test_full_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "ACCELERATOR_CHUNK_BYTES", 2**24)
    problem = _problem(torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head_cross_entropy(**problem, ops="native").loss.backward()
    # A chunk, the head's gradient in float32 and bfloat16, and the states'.
    most = 2**24 + 16384 * 256 * (4 + 2 + 2) + 2 * 3000 * 256 * 2 + 2**20
    assert torch.cuda.max_memory_allocated() - before <= most < 3000 * 16384 * 2


def test_the_kernel_runs_on_the_current_stream() -> None:
    logits, targets, row_weights = _rows(64, 4096, torch.float32)
    want, _ = cross_entropy_rows(logits.clone(), targets, row_weights_R=row_weights, needs_grad=False)
    late = torch.zeros_like(logits)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(logits)
        got, _ = cross_entropy_rows(late, targets, row_weights_R=row_weights, needs_grad=False)
    stream.synchronize()
    assert torch.equal(got, want)
