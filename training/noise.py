"""Windows of codes and what replaces their drafts in training: noise, the model's own drafts; label dropout.

Offset 0 of a window is always the true code. Every draw is counter-based (training/philox.py): the same for a sample at
a step whatever batch, rank or device it is on. This is the plain reference that a fused op must equal bit for bit: a
code is replaced where word 0 < floor(beta * 2**32), by (word 1 * codebook_size) >> 32.

B batch, T positions, K window_size, V codebook_size.
"""

from __future__ import annotations

from functools import partial
from math import exp, pi, sin, sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from training.config import NoiseConfig
from training.cross_entropy import chunk_bytes_of, rows_per_chunk
from training.gpt import evaluation_mode
from training.philox import Purpose, cell_of, draw_words, unit_interval

_BYTES_PER_DRAFT_LOGIT = 16
"""A draft's logit, the same in float32, its probability and the sum up to it."""


def beta_of_offset(config: NoiseConfig, *, window_size: int) -> tuple[float, ...]:
    """Probability that the code at each offset is replaced, `window_size` values; the first is 0.

    Source: method.md's table; u = j / (k - 1) under `closed`, j / k under `open`.
    """
    return tuple(_beta(config, offset, window_size) for offset in range(window_size))


def _beta(config: NoiseConfig, offset: int, window_size: int) -> float:
    if offset == 0 or config.schedule == "none":
        return 0.0
    closed = config.end_point == "closed"
    u = offset / (window_size - 1 if closed else window_size)
    if config.schedule == "linear":
        return u
    if config.schedule == "sine":
        return sin(pi * u / 2)
    if config.schedule == "sqrt":
        return sqrt(u)
    if config.schedule == "exponential":
        rate = 2 / window_size
        return (1 - exp(-offset * rate)) / ((1 - exp(-(window_size - 1) * rate)) if closed else 1.0)
    return 1.0  # full


def valid_offsets(num_positions: int, *, window_size: int, device: torch.device | None = None) -> Tensor:
    """(T, K) bool: whether offset j of the window that starts at code i lies inside the image, i + j < T."""
    positions = torch.arange(num_positions, device=device)[:, None]
    return positions + torch.arange(window_size, device=device) < num_positions


def make_windows(codes_BT: Tensor, *, window_size: int) -> tuple[Tensor, Tensor]:
    """The T overlapping windows of each sample; window i holds codes i .. i + K - 1, zeros beyond the last code.

    Args:
        codes_BT: int64.
        window_size: K >= 1.

    Returns:
        windows_BTK int64, and valid_TK bool (see `valid_offsets`).
    """
    windows_BTK = nn.functional.pad(codes_BT, (0, window_size - 1)).unfold(1, window_size, 1)
    return windows_BTK, valid_offsets(codes_BT.shape[1], window_size=window_size, device=codes_BT.device)


def noise_windows(
    codes_BT: Tensor,
    *,
    betas: tuple[float, ...],
    codebook_size: int,
    coupling: Literal["independent", "shared"],
    seed: int,
    step: int,
    sample_counters_B: Tensor,
) -> Tensor:
    """Windows whose code at offset j is, with probability betas[j], a uniform draw (which may redraw the same code).

    Args:
        codes_BT: int64 in [0, codebook_size).
        betas: K probabilities, the first 0 (see `beta_of_offset`).
        codebook_size: V < 2**31.
        coupling: `independent`: draws per (position of the window, offset); `shared`: per position of the code, so
            that the copies of a code in different windows are noisy together and agree.
        seed: in [0, 2**56).
        step: training step.
        sample_counters_B: int64, what tells the samples of a step apart.

    Returns:
        windows_BTK int64.

    Raises:
        ValueError: beta of offset 0 is not 0.

    Source: method.md, q(x* | x, j) = Cat((1 - beta(j)) onehot(x) + beta(j) / V).
    """
    if betas[0] != 0.0:
        raise ValueError(f"noise windows: beta of offset 0 must be 0, got {betas[0]!r}; use beta_of_offset")
    window_size, device = len(betas), codes_BT.device
    windows_BTK, _ = make_windows(codes_BT, window_size=window_size)
    if not any(betas):
        return windows_BTK.contiguous()
    positions = torch.arange(codes_BT.shape[1], device=device)[:, None]
    offsets = torch.arange(window_size, device=device)
    shared = coupling == "shared"
    cells_TK = cell_of(positions + offsets, torch.zeros_like(offsets)) if shared else cell_of(positions, offsets)
    purpose = Purpose.NOISE_SHARED if shared else Purpose.NOISE_INDEPENDENT
    samples = sample_counters_B.to(device)[:, None, None]
    chance, choice, _, _ = draw_words(purpose, seed=seed, samples=samples, step=step, cells=cells_TK)
    thresholds_K = torch.tensor([int(beta * 2**32) for beta in betas], device=device)
    replacements = (choice * codebook_size) >> 32
    return torch.where(chance < thresholds_K, replacements, windows_BTK)


def draft_windows(
    model: nn.Module,
    windows_BTK: Tensor,
    labels_B: Tensor,
    *,
    temperature: float = 1.0,
    seed: int,
    step: int,
    sample_counters_B: Tensor,
) -> Tensor:
    """Windows as inference shows them: offset 0 clean, the others sampled from the model's own predictions.

    Step i of sampling predicts codes i .. i + K - 1; the next step reads window i = (code i, the drafts that step i
    made of codes i + 1 ..). So the draft at offset j of window i is drawn from logits[:, i, j], in one pass without
    gradient and without dropout over `windows_BTK`. Draws invert the CDF with one uniform per (position, offset).

    Args:
        model: a `TensorAR`; its training mode is restored.
        windows_BTK: int64, windows of the first pass (noised by the schedule), offset 0 true.
        labels_B: int64.
        temperature: > 0, of the drafts.
        seed: in [0, 2**56).
        step: training step.
        sample_counters_B: int64, what tells the samples of a step apart.

    Returns:
        windows_BTK int64.
    """
    positions = torch.arange(windows_BTK.shape[1], device=windows_BTK.device)[:, None]
    offsets = torch.arange(1, windows_BTK.shape[2], device=windows_BTK.device)
    samples = sample_counters_B.to(windows_BTK.device)[:, None, None]
    words, *_ = draw_words(Purpose.OWN_DRAFTS, seed=seed, samples=samples, step=step, cells=cell_of(positions, offsets))
    draw = partial(_draw_drafts, uniforms=unit_interval(words), temperature=temperature)
    with evaluation_mode(model):
        drafts = model(windows_BTK, labels_B, readout=draw)
    return torch.cat([windows_BTK[:, :, :1], drafts], dim=2)


def _draw_drafts(states_BTKD: Tensor, weight_VD: Tensor, *, uniforms: Tensor, temperature: float) -> Tensor:
    """Codes at offsets >= 1, one per uniform; logits exist for a chunk of rows at a time."""
    states, codebook_size = states_BTKD[:, :, 1:].flatten(0, 2), weight_VD.shape[0]
    size = rows_per_chunk(
        len(states), bytes_per_row=_BYTES_PER_DRAFT_LOGIT * codebook_size, chunk_bytes=chunk_bytes_of(states.device)
    )
    drafts = [
        _invert_cdf(nn.functional.linear(rows, weight_VD), draws, temperature=temperature)
        for rows, draws in zip(torch.split(states, size), torch.split(uniforms.flatten(), size), strict=True)
    ]
    return torch.cat(drafts).view_as(uniforms)


def _invert_cdf(logits: Tensor, uniforms: Tensor, *, temperature: float) -> Tensor:
    cdf = torch.softmax(logits.float() / temperature, dim=-1).cumsum(-1)
    return torch.searchsorted(cdf, (uniforms * cdf[..., -1])[..., None]).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def drop_labels(
    labels_B: Tensor, *, fraction: float, null_label: int, seed: int, step: int, sample_counters_B: Tensor
) -> Tensor:
    """Labels of which a share became the null label, and with them every missing label (negative).

    Args:
        labels_B: int64; a negative value means that the sample has no label.
        fraction: probability in [0, 1] that a label is dropped.
        null_label: the label that stands for "no condition" (num_classes).
        seed: in [0, 2**56).
        step: training step.
        sample_counters_B: int64, what tells the samples of a step apart.
    """
    samples = sample_counters_B.to(labels_B.device)
    cells = torch.zeros_like(samples)
    words, *_ = draw_words(Purpose.LABEL_DROPOUT, seed=seed, samples=samples, step=step, cells=cells)
    return labels_B.masked_fill((words < int(fraction * 2**32)) | (labels_B < 0), null_label)
