"""The plain sampler: one backbone call a step for all samples of a batch, one code or a stride of codes final in each.

With a stride s, the call of step p reads the last prediction and its s - 1 shifts (`training.drawing.kept_cells`) and
predicts from its last position alone; nothing of what it read in between is looked at again.

B batch, K window_size, R logit rows, S stride, T positions, V codebook_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.config import SamplerConfig
from training.drawing import draw_windows, kept_cells
from training.frozen import FrozenModel
from training.gpt import KeyValueCache
from training.guidance import guide, num_guided_positions


@dataclass(frozen=True)
class SampledWindows:
    """What a sampler made of one batch, on the model's device."""

    windows_BTK: Tensor
    """int64: window t as the model read it, code t and drafts of the codes after it; 0 beyond the image. The last one
    is never read."""
    calls_B: Tensor
    """int64, backbone calls that each sample took part in."""
    num_backbone_calls: int


def sample_in_steps(
    frozen: FrozenModel, labels_B: Tensor, counters_B: Tensor, *, config: SamplerConfig, seed: int
) -> SampledWindows:
    """Windows of one batch in T / stride backbone calls; arguments as in `training.sampling.sample_codes`."""
    num_samples, num_positions, window_size = len(labels_B), frozen.config.num_positions, frozen.config.window_size
    num_guided = num_guided_positions(config, num_positions=num_positions)
    windows_BTK = labels_B.new_zeros(num_samples, num_positions, window_size)
    cache = KeyValueCache(
        frozen.config,
        batch_size=num_samples * (2 if num_guided else 1),
        dtype=frozen.dtype,
        device=frozen.device,
    )
    steps = range(0, num_positions, config.stride)
    for step in steps:
        if step >= num_guided and cache.batch_size > num_samples:
            cache.keep(torch.arange(cache.batch_size, device=frozen.device) < num_samples)
        last_BSK = windows_BTK[:, max(0, step - config.stride) : step]
        logits_BKV = _step_logits(frozen, labels_B, last_BSK, step=step, cache=cache, config=config)
        stop = min(step + config.stride, num_positions)
        windows_BTK[:, step:stop] = draw_windows(
            logits_BKV,
            kept_cells(config, window_size=window_size, num_windows=stop - step),
            config=frozen.config,
            seed=seed,
            sample_counters_B=counters_B,
            first_positions_B=torch.full_like(counters_B, step),
        )
    return SampledWindows(
        windows_BTK=windows_BTK,
        calls_B=torch.full_like(labels_B, len(steps)),
        num_backbone_calls=len(steps),
    )


def _step_logits(
    frozen: FrozenModel, labels_B: Tensor, last_BSK: Tensor, *, step: int, cache: KeyValueCache, config: SamplerConfig
) -> Tensor:
    """Guided logits (B, K, V) of one step, in float32 or wider; `last_BSK` are the windows since the step before."""
    guided = cache.batch_size > len(labels_B)
    if step == 0:
        null_B = torch.full_like(labels_B, frozen.null_label)
        x_BLD = frozen.embed_labels(torch.cat([labels_B, null_B]) if guided else labels_B)
    else:
        x_BLD = frozen.embed_windows(last_BSK, start=step - last_BSK.shape[1])
        x_BLD = x_BLD.repeat(2, 1, 1) if guided else x_BLD
    h_BLD = frozen.read(x_BLD, start=step + 1 - x_BLD.shape[1], cache=cache)
    logits_BKV = frozen.predict(h_BLD[:, -1:])[:, 0]
    return guide(*logits_BKV.chunk(2), scale=config.guidance) if guided else logits_BKV
