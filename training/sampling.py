"""Labels to codes: cached calls, each predicting K codes of which the first is final and the rest are drafts.

Every draw belongs to a sample, a position and an offset (`training.drawing`), so a picture does not depend on its
batch, and a fresh TensorAR model samples its base model's codes. Guidance doubles the batch while it lasts. With a
stride, s codes become final in one step: T / s steps. `training.speculation` takes fewer steps to the same codes.

B batch, K window_size, N samples, T positions, V codebook_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from training.config import ModelConfig, SamplerConfig
from training.frozen import FrozenModel
from training.gpt import evaluation_mode
from training.speculation import Speculation
from training.steps import Stepping
from training.tensorar import TensorAR


@dataclass(frozen=True)
class SampledCodes:
    """Codes and the way to them, on the CPU."""

    codes_NT: Tensor
    """int64, the final codes."""
    drafts_NTK: Tensor
    """int64: refinement r of each position, the first draft at r = 0, the final at r = K - 1: what the window held that
    the model read K - 1 - r positions before. Where that window came before the position's first prediction (the first
    K - 1 positions; more of them with a stride), the first prediction fills in."""
    flip_rate: float | None
    """Share of positions whose final code differs from their first draft, over positions 1 .. T - 1 (position 0 never
    has a draft); none at window_size 1. With a stride, a draft that became final unrefined counts as one that stood."""
    num_backbone_calls: int
    """Forward passes of the backbone, over all batches."""
    calls_per_sample_N: Tensor
    """int64, passes that each sample took part in."""


def sample_codes(
    model: TensorAR,
    labels_N: Tensor,
    *,
    config: SamplerConfig,
    seed: int,
    sample_counters_N: Tensor | None = None,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> SampledCodes:
    """Codes drawn from a model.

    Args:
        model: on any device, in any float dtype; its training mode is restored.
        labels_N: int64 in [0, num_classes], the last one null.
        config: guidance, temperatures, filters, draft policy, and how many windows or codes a call settles.
        seed: in [0, 2**56).
        sample_counters_N: int64 >= 0, what tells samples apart; 0 .. N - 1 without. A sample is the same wherever its
            counter, label and seed are (up to the rounding of matrix products of other batch shapes).
        batch_size: samples drawn together; all without.
        progress: called with the number of finished samples after each batch.

    Raises:
        ValueError: a label is out of range, or the stride is larger than the model's window_size.
    """
    _check(model, labels_N, config=config)
    num_samples = labels_N.numel()
    counters_N = torch.arange(num_samples) if sample_counters_N is None else sample_counters_N
    size = batch_size or num_samples
    make = Speculation if config.windows_per_call > 1 else Stepping
    windows, calls, num_calls = [], [], 0
    with evaluation_mode(model):
        frozen = FrozenModel(model, num_windows=num_samples * model.config.num_positions)
        for start in range(0, num_samples, size):
            labels_B, counters_B = (x[start : start + size].to(frozen.device) for x in (labels_N, counters_N))
            sampler = make(frozen, labels_B, counters_B, config=config, seed=seed)
            while sampler.advance():
                num_calls += 1
            windows.append(sampler.windows_BTK[:, : model.config.num_positions].cpu())
            calls.append(sampler.calls_B.cpu())
            if progress is not None:
                progress(start + len(labels_B))
    windows_NTK = torch.cat(windows)
    drafts_NTK = refinements(windows_NTK, stride=config.stride)
    return SampledCodes(
        codes_NT=windows_NTK[:, :, 0].contiguous(),
        drafts_NTK=drafts_NTK,
        flip_rate=_flip_rate(drafts_NTK, model.config),
        num_backbone_calls=num_calls,
        calls_per_sample_N=torch.cat(calls),
    )


def _check(model: TensorAR, labels_N: Tensor, *, config: SamplerConfig) -> None:
    if labels_N.numel() == 0 or int(labels_N.min()) < 0 or int(labels_N.max()) > model.null_label:
        raise ValueError(
            f"sample codes: labels must be in [0, {model.null_label}] and at least one, got {labels_N.tolist()}; "
            "use labels of the model's classes"
        )
    if config.stride > model.config.window_size:
        raise ValueError(
            f"sample codes: stride must be in [1, window_size of the model = {model.config.window_size}], "
            f"got {config.stride}; use a smaller one, or a model with a larger window_size"
        )


def _flip_rate(drafts_NTK: Tensor, config: ModelConfig) -> float | None:
    if config.window_size == 1:
        return None
    return (drafts_NTK[:, 1:, 0] != drafts_NTK[:, 1:, -1]).double().mean().item()


def refinements(windows_NTK: Tensor, *, stride: int = 1) -> Tensor:
    """Windows as the model read them -> drafts_NTK, see `SampledCodes`.

    Args:
        windows_NTK: window t holds code t and drafts of the codes after it.
        stride: windows that are not at a multiple of it were not predicted but shifted.
    """
    num_positions, window_size = windows_NTK.shape[1:]
    positions_T1 = torch.arange(num_positions)[:, None]
    first_call_T1 = (positions_T1 - window_size + 1).clamp(min=0).add(stride - 1).div(stride, rounding_mode="floor")
    ages_TK = torch.minimum(torch.arange(window_size - 1, -1, -1), positions_T1 - first_call_T1 * stride)
    return windows_NTK[:, positions_T1 - ages_TK, ages_TK]
