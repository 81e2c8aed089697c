"""Windows to codes: T cached steps, each predicting K codes of which the first is final and the rest are drafts.

Every draw is a Gumbel variable from a counter (seed, sample, position, offset, code), so a picture does not depend on
its batch; a final's draws depend on neither K nor the draft policy, so a fresh TensorAR model samples its base model's
codes. Guidance doubles the batch while it lasts. The draws cost one Philox call per four logits.

B batch, T positions, J offsets inside the image, K window_size, N samples, V codebook_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from training.config import SamplerConfig
from training.gpt import KeyValueCache, evaluation_mode
from training.philox import Purpose, cell_of, draw_words, unit_interval
from training.tensorar import TensorAR

MIN_TEMPERATURE = 1e-5
WORDS_PER_CALL = 4


@dataclass(frozen=True)
class SampledCodes:
    """Codes and the way to them, on the CPU."""

    codes_NT: Tensor
    """int64, the final codes."""
    drafts_NTK: Tensor
    """int64: refinement r of each position, the first draft at r = 0, the final at r = K - 1. The first K - 1 positions
    are predicted fewer than K times; there the earliest prediction fills the refinements before it."""
    flip_rate: float | None
    """Share of positions whose final code differs from their first draft, over positions 1 .. T - 1 (position 0 never
    has a draft); none at window_size 1."""
    num_backbone_calls: int
    """Forward passes of the backbone, over all batches."""


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
        config: guidance, temperature, filters, draft policy.
        seed: in [0, 2**56).
        sample_counters_N: int64 >= 0, what tells samples apart; 0 .. N - 1 without. A sample is the same wherever its
            counter, label and seed are (up to the rounding of matrix products of other batch shapes).
        batch_size: samples drawn together; all without.
        progress: called with the number of finished samples after each batch.

    Raises:
        ValueError: a label is out of range.
    """
    if labels_N.numel() == 0 or int(labels_N.min()) < 0 or int(labels_N.max()) > model.null_label:
        raise ValueError(
            f"sample codes: labels must be in [0, {model.null_label}] and at least one, got {labels_N.tolist()}; "
            "use labels of the model's classes"
        )
    counters_N = torch.arange(labels_N.numel()) if sample_counters_N is None else sample_counters_N
    size = batch_size or labels_N.numel()
    predictions = []
    with evaluation_mode(model):
        for start in range(0, labels_N.numel(), size):
            batch = slice(start, start + size)
            made = _sample_batch(model, labels_N[batch], counters_N[batch], config=config, seed=seed)
            predictions.append(made.cpu())
            if progress is not None:
                progress(start + len(made))
    predictions_NTK = torch.cat(predictions)
    codes_NT = predictions_NTK[:, :, 0]
    drafts_NTK = _refinements(predictions_NTK)
    flips = (drafts_NTK[:, 1:, 0] != codes_NT[:, 1:]).double().mean().item()
    return SampledCodes(
        codes_NT=codes_NT.contiguous(),
        drafts_NTK=drafts_NTK,
        flip_rate=flips if model.config.window_size > 1 and codes_NT.shape[1] > 1 else None,
        num_backbone_calls=len(predictions) * model.config.num_positions,
    )


def _sample_batch(model: TensorAR, labels_B: Tensor, counters_B: Tensor, *, config: SamplerConfig, seed: int) -> Tensor:
    """Predictions (B, T, K): of code t made at offset j; the final is at offset 0."""
    parameter = next(model.parameters())
    labels_B, counters_B = labels_B.to(parameter.device), counters_B.to(parameter.device)
    num_samples, num_positions, window_size = len(labels_B), model.config.num_positions, model.config.window_size
    predictions_BTK = labels_B.new_zeros(num_samples, num_positions, window_size)
    window_BK = labels_B.new_zeros(num_samples, window_size)
    guided = config.guidance != 1.0
    cache = KeyValueCache(
        model.config, batch_size=num_samples * (1 + guided), dtype=parameter.dtype, device=parameter.device
    )
    for step in range(num_positions):
        if guided and not is_guided(step, interval=config.guidance_interval):
            guided = False
            cache.keep(num_samples)
        logits_BKV = _step_logits(model, labels_B, window_BK, step=step, cache=cache, guided=guided, config=config)
        num_inside = min(window_size, num_positions - step)
        codes_BJ = draw_codes(
            logits_BKV[:, :num_inside], config=config, seed=seed, sample_counters_B=counters_B, first_position=step
        )
        window_BK = torch.nn.functional.pad(codes_BJ, (0, window_size - num_inside))
        for offset in range(num_inside):
            predictions_BTK[:, step + offset, offset] = codes_BJ[:, offset]
    return predictions_BTK


def is_guided(step: int, *, interval: int) -> bool:
    """Whether step `step` (0 predicts the first code) is guided; LlamaGen counts its interval from the second code."""
    return interval == -1 or step - 1 <= interval


def _step_logits(
    model: TensorAR,
    labels_B: Tensor,
    window_BK: Tensor,
    *,
    step: int,
    cache: KeyValueCache,
    guided: bool,
    config: SamplerConfig,
) -> Tensor:
    """Guided logits (B, K, V) of one step, in float32 or wider; `window_BK` is what the step before made."""
    if step == 0:
        null_B = torch.full_like(labels_B, model.null_label)
        x_B1D = model.base.embed_labels(torch.cat([labels_B, null_B]) if guided else labels_B)
    else:
        x_B1D = model.embed_windows(window_BK[:, None], start=step - 1)
        x_B1D = x_B1D.repeat(2, 1, 1) if guided else x_B1D
    logits: Tensor = model.predict(model.base.backbone(x_B1D, start=step, cache=cache))[:, 0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if guided:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + (conditional - unconditional) * config.guidance
    return logits


def draw_codes(
    logits_BJV: Tensor, *, config: SamplerConfig, seed: int, sample_counters_B: Tensor, first_position: int
) -> Tensor:
    """Codes (B, J) of one step: the final of position `first_position`, then drafts of the positions after it.

    Args:
        logits_BJV: guided, float32 or wider.
        config: temperature, filters and draft policy.
        seed: in [0, 2**56).
        sample_counters_B: int64.
        first_position: of offset 0.
    """
    num_offsets = logits_BJV.shape[1]
    drafts_greedy = config.draft_policy == "argmax"
    draft_temperature = config.temperature if config.draft_temperature is None else config.draft_temperature
    temperatures = [config.temperature] + [0.0 if drafts_greedy else draft_temperature] * (num_offsets - 1)
    greedy_J = torch.tensor([value == 0.0 for value in temperatures], device=logits_BJV.device)
    if all(value == 0.0 for value in temperatures):
        return logits_BJV.argmax(-1)
    scales_J1 = logits_BJV.new_tensor([max(value, MIN_TEMPERATURE) for value in temperatures])[:, None]
    filtered = filter_logits(logits_BJV / scales_J1, top_k=config.top_k, top_p=config.top_p)
    offsets_J = torch.arange(num_offsets, device=logits_BJV.device)
    gumbels_BJV = gumbel_draws(
        seed=seed,
        sample_counters_B=sample_counters_B,
        positions_J=first_position + offsets_J,
        streams_J=torch.zeros_like(offsets_J) if config.draft_policy == "coupled" else offsets_J,
        codebook_size=logits_BJV.shape[2],
    )
    return torch.where(greedy_J, logits_BJV.argmax(-1), (filtered + gumbels_BJV).argmax(-1))


def gumbel_draws(
    *, seed: int, sample_counters_B: Tensor, positions_J: Tensor, streams_J: Tensor, codebook_size: int
) -> Tensor:
    """Standard Gumbel variables (B, J, V) float32; argmax(log p + gumbel) is a draw from p.

    Args:
        seed: in [0, 2**56).
        sample_counters_B: int64.
        positions_J: int64, position of the code.
        streams_J: int64, offset of the prediction, or 0 where draws are kept across refinements.
        codebook_size: V <= 2**18.
    """
    calls = torch.arange(math.ceil(codebook_size / WORDS_PER_CALL), device=positions_J.device)
    words = draw_words(
        Purpose.SAMPLING,
        seed=seed,
        samples=sample_counters_B[:, None, None],
        step=streams_J[:, None],
        cells=cell_of(positions_J[:, None], calls),
    )
    uniforms = unit_interval(torch.stack(words, dim=-1).flatten(-2)[..., :codebook_size])
    return -torch.log(-torch.log(uniforms))


def filter_logits(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Logits (..., V) with -inf where LlamaGen's filters remove a code.

    Args:
        logits: already divided by the temperature.
        top_k: codes kept, ties with the last one too; 0 is all.
        top_p: the most likely codes are kept up to the first whose running probability is above it; 1 is all.
    """
    if top_k > 0:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        above = ordered.softmax(-1).cumsum(-1) > top_p
        removed = torch.zeros_like(above)
        removed[..., 1:] = above[..., :-1]
        logits = logits.masked_fill(removed.scatter(-1, order, removed), -math.inf)
    return logits


def _refinements(predictions_NTK: Tensor) -> Tensor:
    """Predictions by offset as refinements in the order they were made, earliest first."""
    num_positions, window_size = predictions_NTK.shape[1:]
    offsets_K = torch.arange(window_size - 1, -1, -1)
    made_TK = torch.minimum(offsets_K, torch.arange(num_positions)[:, None])
    return predictions_NTK.gather(2, made_TK.expand(len(predictions_NTK), -1, -1))
