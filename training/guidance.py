"""Classifier-free guidance: which positions it takes part in, and how two predictions become one.

The head is linear, so that guided states give guided logits: half as many rows go through it, and no logits are mixed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.config import SamplerConfig


def is_guided(step: int, *, interval: int) -> bool:
    """Whether step `step` (0 predicts the first code) is guided; LlamaGen counts its interval from the second code."""
    return interval == -1 or step - 1 <= interval


def num_guided_positions(config: SamplerConfig, *, num_positions: int) -> int:
    """How many positions, from the first on, are predicted with guidance; 0 where it is off."""
    if config.guidance == 1.0:
        return 0
    return sum(is_guided(step, interval=config.guidance_interval) for step in range(num_positions))


def guide(conditional: Tensor, unconditional: Tensor, *, scale: float) -> Tensor:
    """States that lie `scale` times as far from the unconditional ones as the conditional ones do, mixed in float32."""
    wide = torch.promote_types(conditional.dtype, torch.float32)
    unconditional = unconditional.to(wide)
    return (conditional.to(wide) - unconditional).mul_(scale).add_(unconditional).to(conditional.dtype)
