"""One prediction drawn by itself, for tests of what a draw is."""

import torch

from training.config import SamplerConfig
from training.drawing import Draws, draw_cells, predicted_cells


def draw_codes(
    logits_BJV: torch.Tensor, *, config: SamplerConfig, seed: int, sample_counters_B: torch.Tensor, first_position: int
) -> torch.Tensor:
    """Codes (B, J) of one prediction: the final of position `first_position`, then drafts of the positions after it.

    Args:
        logits_BJV: guided, float32 or wider.
        config: temperatures, filters and draft policy.
        seed: in [0, 2**56).
        sample_counters_B: int64.
        first_position: of offset 0.
    """
    draws = Draws(seed, sample_counters_B, torch.full_like(sample_counters_B, first_position))
    return draw_cells(logits_BJV, predicted_cells(config, window_size=logits_BJV.shape[1]), draws)
