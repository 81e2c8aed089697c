"""The loss of windows: cross-entropy per offset in float32, weighted over the offsets.

Targets beyond the last code are ignored; each offset's loss is the mean over its own valid targets, so that the weights
mean what they say at the tail too. One float32 copy of the logits is made.

B batch, T positions, K window_size, V codebook_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training.noise import make_windows


@dataclass(frozen=True)
class WindowLoss:
    """The weighted loss and what it is made of."""

    loss: Tensor
    """Scalar float32 with gradient."""
    loss_of_offset_K: Tensor
    """(K,) float32, mean cross-entropy in nats; detached."""
    accuracy_of_offset_K: Tensor
    """(K,) float32 in [0, 1]; detached."""


def window_loss(
    logits_BTKV: Tensor, codes_BT: Tensor, *, offset_weights: tuple[float, ...] | None = None
) -> WindowLoss:
    """Weighted cross-entropy of windows.

    Args:
        logits_BTKV: any float dtype; position p, offset j predicts code p + j.
        codes_BT: int64, the true codes.
        offset_weights: K weights, normalised to sum 1; none is 1/K each.

    Returns:
        The loss with its per-offset parts.

    Raises:
        ValueError: the weights are not K, or sum to 0.

    Source: method.md, sum over i, j of w_j * CE(logits_{i,j}, x_{i+1+j}).
    """
    window_size = logits_BTKV.shape[2]
    weights = offset_weights or (1.0,) * window_size
    if len(weights) != window_size or not sum(weights) > 0:
        raise ValueError(
            f"window loss: offset_weights must be {window_size} weights of positive sum, got {weights}; give them"
        )
    targets_BTK, valid_TK = make_windows(codes_BT, window_size=window_size)
    entropies = F.cross_entropy(logits_BTKV.flatten(0, 2).float(), targets_BTK.flatten(), reduction="none")
    counts_K = valid_TK.sum(0) * codes_BT.shape[0]
    loss_K = (entropies.view_as(targets_BTK) * valid_TK).sum((0, 1)) / counts_K
    with torch.no_grad():
        hits = (logits_BTKV.argmax(-1) == targets_BTK) & valid_TK
        accuracy_K = hits.sum((0, 1)) / counts_K
    weights_K = torch.tensor(weights, dtype=torch.float32, device=loss_K.device)
    return WindowLoss((loss_K * weights_K).sum() / weights_K.sum(), loss_K.detach(), accuracy_K)
