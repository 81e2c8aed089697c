"""Cross-entropy of a linear head in chunks of rows: `tensorar::head_cross_entropy`; full logits never exist.

Each chunk's logits are made once, turned into their own gradient in place, and multiplied into the gradients of states
and weight at once: one product forward, two backward, as a plain head has, and nothing kept for backward but those two
gradients. Softmax and sums are float32 (float64 for float64 states); chunks are summed in their order, so results are
the same bits from run to run. Between the products torch's own kernels pass over a chunk several times; on CUDA the
native op `cross_entropy_rows` does it in one.

R rows, D model_dim, V codebook_size.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from training.ops import cross_entropy_rows, load_ops

CPU_CHUNK_BYTES = 32 * 2**20
"""Memory of one chunk's logits and their softmax; a CPU gains nothing from more (measured)."""
ACCELERATOR_CHUNK_BYTES = 256 * 2**20
"""Larger, to make up for a chunk's launches: on an H100 a quarter of it takes 20 % longer, twice of it 4 % less."""


class HeadLoss(NamedTuple):
    """What a head's predictions come to; a tuple, in which DeepSpeed's hooks see the tensors."""

    loss: Tensor
    """Scalar, float32 (float64 for float64 states), with gradient: the sum of row weight times entropy."""
    entropies: Tensor
    """Cross-entropy of each row in nats, same dtype, shape of the targets; no gradient."""
    hits: Tensor
    """Bool, shape of the targets: whether the largest logit is the target's."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what sums over values of `dtype` are made in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bytes_per_logit(dtype: torch.dtype, *, is_native: bool = False) -> int:
    """Return what a logit takes while its chunk is at work: itself and, but for the native op, its softmax."""
    return dtype.itemsize + (0 if is_native else wide_dtype(dtype).itemsize)


def chunk_bytes_of(device: torch.device) -> int:
    """Return the memory that a chunk's logits may take on a device."""
    return CPU_CHUNK_BYTES if device.type == "cpu" else ACCELERATOR_CHUNK_BYTES


def rows_per_chunk(num_rows: int, *, bytes_per_row: int, chunk_bytes: int) -> int:
    """Return the size of equal chunks (the last perhaps smaller) that stay within `chunk_bytes`; at least 1."""
    most = max(1, chunk_bytes // bytes_per_row)
    num_chunks = max(1, -(-num_rows // most))
    return max(1, -(-num_rows // num_chunks))


def head_cross_entropy(
    states: Tensor,
    weight_VD: Tensor,
    *,
    targets: Tensor,
    row_weights: Tensor,
    gradient_scales: Tensor | None = None,
    ops: Literal["native", "reference"] = "reference",
) -> HeadLoss:
    """Weighted cross-entropy of softmax(states @ weight.T), and of each row.

    Gradients of states and weight are made in this call, where grad mode and `requires_grad` ask for them, and only
    scaled in backward (in place: gradients are handed on, not copied). There is no second derivative.

    Args:
        states: (..., D) float, after the final norm.
        weight_VD: the head's, same dtype.
        targets: (...) int64 in [0, V).
        row_weights: (...) float, what each row's entropy counts in the loss; 0 ignores it. No gradient.
        gradient_scales: (...) float, what each row's part of the weight's gradient is multiplied by; none is 1. The
            gradient of the states is not.
        ops: `native` takes `cross_entropy_rows` on CUDA, for float32 and bfloat16; elsewhere torch's kernels do it.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
        NativeOpError: the library of native ops cannot be used.
    """
    _check(states, weight_VD, targets, row_weights, gradient_scales)
    is_native = ops == "native" and states.is_cuda and states.dtype in (torch.float32, torch.bfloat16) and load_ops()
    has_grad = torch.is_grad_enabled()
    loss, entropies_R, hits_R, _, _ = _head_cross_entropy(
        states.flatten(0, -2),
        weight_VD,
        targets.flatten(),
        row_weights.flatten().to(wide_dtype(states.dtype)),
        chunk_bytes_of(states.device),
        has_grad and states.requires_grad,
        has_grad and weight_VD.requires_grad,
        None if gradient_scales is None else gradient_scales.flatten(),
        is_native,
    )
    return HeadLoss(loss, entropies_R.view(targets.shape), hits_R.view(targets.shape))


def _check(
    states: Tensor, weight_VD: Tensor, targets: Tensor, row_weights: Tensor, gradient_scales: Tensor | None
) -> None:
    if states.shape[-1] != weight_VD.shape[1] or states.dtype != weight_VD.dtype:
        raise ValueError(
            f"cross-entropy of a head: states must be (..., {weight_VD.shape[1]}) {weight_VD.dtype} as its weight, "
            f"got {tuple(states.shape)} {states.dtype}; give states of the same model"
        )
    for name, values in (("targets", targets), ("row_weights", row_weights), ("gradient_scales", gradient_scales)):
        if values is not None and values.shape != states.shape[:-1]:
            raise ValueError(
                f"cross-entropy of a head: {name} must be one per state, {tuple(states.shape[:-1])}, "
                f"got {tuple(values.shape)}; give as many"
            )


def chunked_cross_entropy(
    states_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    row_weights_R: Tensor,
    chunk_bytes: int,
    needs_grad_states: bool,
    needs_grad_weight: bool,
    gradient_scales_R: Tensor | None = None,
    is_native: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op itself: loss, entropies_R, hits_R, gradients of states and weight (empty where they are not needed)."""
    entropies_R = torch.empty_like(row_weights_R)
    hits_R = torch.empty_like(targets_R, dtype=torch.bool)
    grad_states_RD = torch.empty_like(states_RD) if needs_grad_states else states_RD.new_empty(0)
    grad_weight = weight_VD.new_zeros(weight_VD.shape if needs_grad_weight else 0, dtype=row_weights_R.dtype)
    needs_grad = needs_grad_states or needs_grad_weight
    read_rows = cross_entropy_rows if is_native else _cross_entropy_rows
    row_bytes = weight_VD.shape[0] * bytes_per_logit(states_RD.dtype, is_native=is_native)
    size = rows_per_chunk(len(states_RD), bytes_per_row=row_bytes, chunk_bytes=chunk_bytes)
    for start in range(0, len(states_RD), size):
        rows = slice(start, start + size)
        logits = states_RD[rows] @ weight_VD.t()
        entropies_R[rows], hits_R[rows] = read_rows(
            logits, targets_R[rows], row_weights_R=row_weights_R[rows], needs_grad=needs_grad
        )
        if needs_grad_states:
            torch.mm(logits, weight_VD, out=grad_states_RD[rows])
        if needs_grad_weight:
            states = states_RD[rows]
            if gradient_scales_R is not None:
                states = (states * gradient_scales_R[rows, None]).to(states.dtype)
            _add_product(grad_weight, logits.t(), states)
    loss = (row_weights_R * entropies_R).sum()
    return loss, entropies_R, hits_R, grad_states_RD, grad_weight.to(weight_VD.dtype)


def _cross_entropy_rows(
    logits: Tensor, targets_R: Tensor, *, row_weights_R: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """What `training.ops.cross_entropy_rows` computes, by torch's own kernels; for any float dtype on any device."""
    top, top_code = logits.max(-1, keepdim=True)
    targets = targets_R[:, None]
    shares = torch.softmax(logits, -1, dtype=row_weights_R.dtype)
    # The top code's share is at least 1 / V: its logarithm gives log(sum(exp)) at full precision.
    above = top.to(shares.dtype) - logits.gather(1, targets).to(shares.dtype)
    entropies_R = (above - shares.gather(1, top_code).log()).squeeze(1)
    if needs_grad:
        shares.scatter_add_(1, targets, shares.new_full((1, 1), -1.0).expand_as(targets))
        torch.mul(shares, row_weights_R[:, None], out=logits)
    return entropies_R, (top_code == targets).squeeze(1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:  # bfloat16 straight into float32
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right)


_head_cross_entropy = torch.library.custom_op("tensorar::head_cross_entropy", chunked_cross_entropy, mutates_args=())


@_head_cross_entropy.register_fake
def _(
    states_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    row_weights_R: Tensor,
    chunk_bytes: int,
    needs_grad_states: bool,
    needs_grad_weight: bool,
    gradient_scales_R: Tensor | None = None,
    is_native: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        row_weights_R.new_empty(()),
        torch.empty_like(row_weights_R),
        torch.empty_like(targets_R, dtype=torch.bool),
        torch.empty_like(states_RD) if needs_grad_states else states_RD.new_empty(0),
        torch.empty_like(weight_VD) if needs_grad_weight else weight_VD.new_empty(0),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])


def _scale_gradients(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradients = ctx.saved_tensors
    is_traced = type(grad_loss) is not Tensor
    if torch.is_grad_enabled() and not is_traced:
        raise RuntimeError(
            "differentiate head_cross_entropy: it has no second derivative, got backward with create_graph=True; use "
            "torch.nn.functional.cross_entropy on the full logits"
        )
    if is_traced or torch._C._autograd._get_current_graph_task_keep_graph():  # they must stay as they are
        gradients = [gradient * grad_loss for gradient in gradients]
    elif grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:  # a CPU need not wait to look
        gradients = [gradient.mul_(grad_loss) for gradient in gradients]
    needed = (gradient if needs else None for gradient, needs in zip(gradients, ctx.needs_input_grad, strict=False))
    return (*needed, *(None for _ in range(7)))


_head_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)
