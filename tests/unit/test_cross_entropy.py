"""The chunked cross-entropy of a head against torch's own on full logits, in value, gradient and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from training import cross_entropy
from training.cross_entropy import HeadLoss, head_cross_entropy, rows_per_chunk

V, D = 37, 8


def problem(num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, weight, targets, row weights, of which some are 0."""
    generator = torch.Generator().manual_seed(num_rows)
    states = torch.randn(num_rows, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (num_rows,), generator=generator)
    row_weights = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    row_weights[::4] = 0
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, row_weights.to(wide)


def plain(states: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor) -> HeadLoss:
    logits = F.linear(states, weight)
    entropies = F.cross_entropy(logits.to(row_weights.dtype), targets, reduction="none")
    return HeadLoss((entropies * row_weights).sum(), entropies, logits.argmax(-1) == targets)


@pytest.fixture(params=[1, 3, 1000], ids=["a row a chunk", "uneven chunks", "one chunk"])
def rows_a_chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Sets the budget so that a float32 chunk holds so many rows."""
    rows: int = request.param
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK_BYTES", 8 * V * rows)
    return rows


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_loss_and_gradients_are_those_of_full_logits(rows_a_chunk: int, dtype: torch.dtype, tolerance: float) -> None:
    states, weight, targets, row_weights = problem(11, dtype)
    expected = plain(states, weight, targets, row_weights)
    expected_grads = torch.autograd.grad(0.7 * expected.loss, (states, weight))
    got = head_cross_entropy(states, weight, targets=targets, row_weights=row_weights)
    grads = torch.autograd.grad(0.7 * got.loss, (states, weight))
    assert got.loss.dtype == got.entropies.dtype == torch.float32
    torch.testing.assert_close(got.entropies, expected.entropies.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.hits, expected.hits)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def test_gradients_are_the_derivatives(rows_a_chunk: int) -> None:
    states, weight, targets, row_weights = problem(7, torch.float64)

    def loss(states: Tensor, weight: Tensor) -> Tensor:
        return head_cross_entropy(states, weight, targets=targets, row_weights=row_weights).loss

    assert torch.autograd.gradcheck(loss, (states, weight))


def test_entropies_are_exact_where_a_share_vanishes() -> None:
    # Of logits 0 and 200 the first has probability e^-200, which float32 cannot hold.
    states, weight = torch.tensor([[200.0]]), torch.tensor([[0.0], [1.0]])
    got = head_cross_entropy(states, weight, targets=torch.tensor([0]), row_weights=torch.ones(1))
    assert got.loss.item() == 200.0
    sure = head_cross_entropy(states, weight, targets=torch.tensor([1]), row_weights=torch.ones(1))
    assert (sure.loss.item(), bool(sure.hits)) == (0.0, True)


def test_a_logit_that_is_not_finite_makes_the_loss_so() -> None:
    states, weight, targets, row_weights = problem(5, torch.float32)
    states.data[2, 0] = float("inf")
    assert not head_cross_entropy(states, weight, targets=targets, row_weights=row_weights).loss.isfinite()


class _Products(TorchDispatchMode):
    """Counts products and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_products = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.num_products += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        tensors = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]
        self.largest = max([self.largest, *(x.numel() for x in tensors)])
        return out


@pytest.mark.parametrize(("wants_states", "wants_weight"), [(True, True), (True, False), (False, True), (False, False)])
def test_three_products_a_chunk_and_only_those_that_are_needed(wants_states: bool, wants_weight: bool) -> None:
    states, weight, targets, row_weights = problem(12, torch.float32)
    inputs = (states.detach(), weight.detach(), targets, row_weights)
    with _Products() as seen:
        cross_entropy.chunked_cross_entropy(*inputs, 8 * V * 3, wants_states, wants_weight)
    assert seen.num_products == 4 * (1 + wants_states + wants_weight)
    assert seen.largest == max(V * D if wants_weight else 0, V * D, 12 * D)  # the head itself; a chunk is 3 * V


def test_nothing_but_losses_is_computed_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight, targets, row_weights = problem(6, torch.float32)
    asked = []
    op = cross_entropy._head_cross_entropy
    monkeypatch.setattr(cross_entropy, "_head_cross_entropy", lambda *args: asked.append(args[5:7]) or op(*args))
    with torch.no_grad():
        assert not head_cross_entropy(states, weight, targets=targets, row_weights=row_weights).loss.requires_grad
    head_cross_entropy(states, weight.detach(), targets=targets, row_weights=row_weights)
    assert asked == [(False, False), (True, False)]


def test_a_second_derivative_is_refused() -> None:
    states, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    loss = head_cross_entropy(states * states, weight, targets=torch.arange(5), row_weights=torch.ones(5)).loss
    with pytest.raises(RuntimeError, match="it has no second derivative, got backward with create_graph=True"):
        torch.autograd.grad(loss, states, create_graph=True)


def test_backward_may_be_repeated_where_the_graph_is_kept() -> None:
    states, weight, targets, row_weights = problem(6, torch.float32)
    loss = 3 * head_cross_entropy(states, weight, targets=targets, row_weights=row_weights).loss
    first = torch.autograd.grad(loss, (states, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (states, weight))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_runs_repeat_bit_for_bit(rows_a_chunk: int) -> None:
    states, weight, targets, row_weights = problem(50, torch.bfloat16)

    def grads() -> tuple[Tensor, ...]:
        loss = head_cross_entropy(states, weight, targets=targets, row_weights=row_weights).loss
        return (loss, *torch.autograd.grad(loss, (states, weight)))

    assert all(torch.equal(*pair) for pair in zip(grads(), grads(), strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
def test_a_row_gives_its_scaled_part_to_the_weights_gradient_alone(
    rows_a_chunk: int, dtype: torch.dtype, tolerance: float
) -> None:
    states, weight, targets, row_weights = problem(11, dtype)
    scales = torch.linspace(0.0, 1.0, 11)
    exact = states.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    entropies = F.cross_entropy(F.linear(*exact), targets, reduction="none") * row_weights.double()
    wanted_states = torch.autograd.grad(entropies.sum(), exact[0], retain_graph=True)[0]
    wanted_weight = torch.autograd.grad((entropies * scales.double()).sum(), exact[1])[0]
    plain = head_cross_entropy(states, weight, targets=targets, row_weights=row_weights)
    got = head_cross_entropy(states, weight, targets=targets, row_weights=row_weights, gradient_scales=scales)
    assert torch.equal(got.loss, plain.loss)
    assert torch.equal(got.entropies, plain.entropies)
    for gradient, wanted in zip(
        torch.autograd.grad(got.loss, (states, weight)), (wanted_states, wanted_weight), strict=True
    ):
        assert gradient.dtype == dtype
        torch.testing.assert_close(
            gradient.double(), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max())
        )


@pytest.mark.parametrize("wants_gradients", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_is_registered_as_torch_demands(dtype: torch.dtype, wants_gradients: bool) -> None:
    states, weight, targets, row_weights = problem(5, dtype)
    inputs = (states, weight) if wants_gradients else (states.detach(), weight.detach())
    arguments = (*inputs, targets, row_weights, 8 * V * 2, wants_gradients, wants_gradients)
    torch.library.opcheck(torch.ops.tensorar.head_cross_entropy, arguments)
    torch.library.opcheck(torch.ops.tensorar.head_cross_entropy, (*arguments, torch.rand(5)))


def test_it_compiles_without_a_graph_break_and_recomputes_under_checkpointing() -> None:
    states, weight, targets, row_weights = problem(9, torch.float32)

    def loss(states: Tensor, weight: Tensor) -> Tensor:
        return head_cross_entropy(2 * states, weight, targets=targets, row_weights=row_weights).loss / 3

    expected = torch.autograd.grad(plain(2 * states, weight, targets, row_weights).loss / 3, (states, weight))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for value in (
        compiled(states, weight),
        checkpoint(loss, states, weight, use_reentrant=False),
        checkpoint(loss, states, weight, use_reentrant=True),
    ):
        value.backward()
        assert states.grad is not None
        assert weight.grad is not None
        torch.testing.assert_close((states.grad, weight.grad), expected)
        states.grad = weight.grad = None


@pytest.mark.parametrize(
    ("num_rows", "most", "size"), [(10, 4, 4), (8, 3, 3), (9, 8, 5), (5, 100, 5), (0, 4, 1), (3, 0, 1)]
)
def test_chunks_are_as_equal_as_the_budget_allows(num_rows: int, most: int, size: int) -> None:
    assert rows_per_chunk(num_rows, bytes_per_row=10, chunk_bytes=10 * most + 9) == size


@pytest.mark.parametrize(
    ("states", "num_targets", "message"),
    [
        (torch.zeros(3, D + 1), 3, r"states must be \(..., 8\) torch.float32 as its weight, got \(3, 9\)"),
        (torch.zeros(3, D, dtype=torch.bfloat16), 3, "got .* torch.bfloat16; give states of the same model"),
        (torch.zeros(3, D), 2, r"targets must be one per state, \(3,\), got \(2,\)"),
    ],
)
def test_what_does_not_belong_together_is_refused(states: Tensor, num_targets: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_cross_entropy(
            states,
            torch.zeros(V, D),
            targets=torch.zeros(num_targets, dtype=torch.int64),
            row_weights=torch.ones(num_targets),
        )
