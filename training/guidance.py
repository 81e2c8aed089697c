"""Classifier-free guidance: which positions it takes part in, and how two predictions become one."""

from __future__ import annotations

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
    """Logits that lie `scale` times as far from the unconditional ones as the conditional ones do."""
    return (conditional - unconditional).mul_(scale).add_(unconditional)
