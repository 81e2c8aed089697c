"""The loss of windows: cross-entropy per offset, weighted over the offsets, read out of a model without full logits.

Targets beyond the last code are ignored; each offset's loss is the mean over its own valid targets (or an unbiased
estimate of it, see `training.scored`), so that the weights mean what they say at the tail too.

B batch, T positions, K window_size, V codebook_size, R predictions scored of a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from training.cross_entropy import HeadLoss, head_cross_entropy, wide_dtype
from training.noise import make_windows
from training.scored import Scored


@dataclass(frozen=True)
class WindowLoss:
    """The weighted loss and what it is made of."""

    loss: Tensor
    """Scalar float32 with gradient."""
    loss_of_offset_K: Tensor
    """(K,) float32, mean cross-entropy in nats, estimated where a sample of the predictions is scored; detached."""
    accuracy_of_offset_K: Tensor
    """(K,) float32 in [0, 1], share of the scored predictions whose largest logit is the target's; detached."""


def window_loss(
    model: Callable[..., Any],
    windows_BTK: Tensor,
    labels_B: Tensor,
    *,
    scored: Scored,
    offset_weights: tuple[float, ...] | None = None,
    ops: Literal["native", "reference"] = "reference",
) -> WindowLoss:
    """Weighted cross-entropy of a model's predictions; in a float64 model all of it is float64.

    Args:
        model: a `TensorAR`, or the DeepSpeed engine around one.
        windows_BTK: int64, as the model reads them.
        labels_B: int64.
        scored: the predictions that count, their targets, and how much of those at offsets >= 1 the base model learns.
        offset_weights: K weights, normalised to sum 1; none is 1/K each.
        ops: see `training.cross_entropy.head_cross_entropy`.

    Returns:
        The loss with its per-offset parts.

    Raises:
        ValueError: the weights are not K, or sum to 0.

    Source: method.md, sum over i, j of w_j * CE(logits_{i,j}, x_{i+1+j}).
    """
    shares = _shares(offset_weights, window_size=len(scored.num_of_offset))
    readout = partial(_read_loss, scored, shares, ops)
    parts: HeadLoss = model(windows_BTK, labels_B, scored=scored, readout=readout)
    sums_K = scored.sum_of_offset(parts.entropies)
    num_hits_K, num_inside_K = (scored.sum_of_offset(x) for x in (parts.hits, torch.ones_like(parts.hits)))
    return WindowLoss(
        loss=parts.loss,
        loss_of_offset_K=sums_K * sums_K.new_tensor(scored.scale_of_offset),
        accuracy_of_offset_K=num_hits_K / num_inside_K.clamp(min=1),
    )


def _read_loss(
    scored: Scored,
    shares: list[float],
    ops: Literal["native", "reference"],
    states_BRD: Tensor,
    weight_VD: Tensor,
) -> HeadLoss:
    of_offset = [share * scale for share, scale in zip(shares, scored.scale_of_offset, strict=True)]
    weights_K = torch.tensor(of_offset, dtype=wide_dtype(states_BRD.dtype), device=states_BRD.device)
    row_weights_BR = weights_K[scored.offsets_R] * scored.is_inside_BR
    scales_R = scored.gradient_scales
    return head_cross_entropy(
        states_BRD,
        weight_VD,
        targets=scored.targets_BR,
        row_weights=row_weights_BR,
        gradient_scales=None if scales_R is None else scales_R.expand_as(row_weights_BR),
        ops=ops,
    )


def reference_window_loss(
    logits_BTKV: Tensor, codes_BT: Tensor, *, offset_weights: tuple[float, ...] | None = None
) -> WindowLoss:
    """What `window_loss` computes, from full logits in plain torch: for tests and benchmarks to compare with.

    Args:
        logits_BTKV: any float dtype; position p, offset j predicts code p + j.
        codes_BT: int64, the true codes.
        offset_weights: as in `window_loss`.

    Raises:
        ValueError: the weights are not K, or sum to 0.
    """
    window_size = logits_BTKV.shape[2]
    targets_BTK, valid_TK = make_windows(codes_BT, window_size=window_size)
    wide = wide_dtype(logits_BTKV.dtype)
    entropies = F.cross_entropy(logits_BTKV.flatten(0, 2).to(wide), targets_BTK.flatten(), reduction="none")
    counts_K = valid_TK.sum(0) * codes_BT.shape[0]
    loss_K = (entropies.view_as(targets_BTK) * valid_TK).sum((0, 1)) / counts_K
    shares_K = loss_K.new_tensor(_shares(offset_weights, window_size=window_size))
    hits = (logits_BTKV.argmax(-1) == targets_BTK) & valid_TK
    return WindowLoss((loss_K * shares_K).sum(), loss_K.detach(), hits.sum((0, 1)) / counts_K)


def _shares(offset_weights: tuple[float, ...] | None, *, window_size: int) -> list[float]:
    weights = offset_weights or (1.0,) * window_size
    if len(weights) != window_size or not sum(weights) > 0:
        raise ValueError(
            f"window loss: offset_weights must be {window_size} weights of positive sum, got {weights}; give them"
        )
    return [weight / sum(weights) for weight in weights]
