"""Gradients that are scaled on their way back: the value itself forward, bit for bit.

It keeps what offsets >= 1 teach out of the base model (`noise.draft_gradient_scale`) while the modules learn all of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, scale: float | Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float | Tensor], output: Tensor) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient * ctx.scale).to(gradient.dtype), None


def scale_gradient(x: Tensor, scale: float | Tensor) -> Tensor:
    """Return `x`, whose gradient is multiplied by `scale`.

    Args:
        x: any float dtype.
        scale: in [0, 1]; a tensor is broadcast with `x`, the result has the shape of both, and the gradients of the
            copies of `x` are summed after they are scaled.
    """
    if isinstance(scale, Tensor):
        x = x.expand(torch.broadcast_shapes(x.shape, scale.shape))  # type: ignore[no-untyped-call]
    out: Tensor = _ScaledGradient.apply(x, scale)  # type: ignore[no-untyped-call]
    return out
