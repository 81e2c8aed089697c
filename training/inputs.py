"""Codes and labels -> what the model reads in a micro step: windows with noised or own drafts, some labels dropped.

Invariant: a pure function of (spec, weights, samples, step): every draw is keyed by the seed, the step and the sample's
counter, so the same on any rank and after any resume.

B batch, T positions, K window_size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.philox import Int64Array, Purpose, random_words
from training import ops
from training.config import TrainConfig
from training.noise import beta_of_offset, draft_windows, drop_labels, noise_windows

VALIDATION_STEP = 0
"""The step that keys the draws of validation; training begins at step 1."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One micro batch on the model's device, all int64."""

    codes_BT: Tensor
    """True codes, the targets."""
    labels_B: Tensor
    """Labels in [0, num_classes]; num_classes is the null label."""
    windows_BTK: Tensor
    """Windows as the model reads them."""
    counters_B: Tensor
    """What tells the samples of a step apart in every draw."""


def make_inputs(
    codes_BT: Int64Array,
    labels_B: Int64Array,
    counters_B: Int64Array,
    *,
    config: TrainConfig,
    step: int,
    label_dropout: float,
    device: torch.device,
) -> Inputs:
    """Return inputs whose drafts are noised by the schedule.

    Args:
        codes_BT: true codes.
        labels_B: negative where a sample has none.
        counters_B: see `Inputs`.
        config: of the run.
        step: training step from 1 on; 0 is validation.
        label_dropout: share of labels that become the null label.
        device: where the inputs go.
    """
    codes, labels, counters = (torch.from_numpy(array).to(device) for array in (codes_BT, labels_B, counters_B))
    noise = ops.noise_windows if config.engine.ops == "native" else noise_windows
    windows_BTK = noise(
        codes,
        betas=betas_of_step(config, step=step),
        codebook_size=config.model.codebook_size,
        coupling=config.noise.coupling,
        seed=config.seed,
        step=step,
        sample_counters_B=counters,
    )
    dropped = drop_labels(
        labels,
        fraction=label_dropout,
        null_label=config.model.num_classes,
        seed=config.seed,
        step=step,
        sample_counters_B=counters,
    )
    return Inputs(codes_BT=codes, labels_B=dropped, windows_BTK=windows_BTK, counters_B=counters)


def betas_of_step(config: TrainConfig, *, step: int) -> tuple[float, ...]:
    """Return the probabilities that the code at each offset is replaced: the schedule, in training with its jitter.

    The jitter is a draw of (seed, step) for all offsets, so that beta still rises with the offset. It is one a step and
    not one a sample because `noise_windows` takes a beta for each offset of a whole batch [ours].

    Args:
        config: of the run.
        step: training step from 1 on; 0 is validation, which has the schedule itself.
    """
    betas = beta_of_offset(config.noise, window_size=config.model.window_size)
    if step == VALIDATION_STEP or config.noise.beta_jitter == 0.0:
        return betas
    shift = config.noise.beta_jitter * (2.0 * _unit_draw(config, Purpose.BETA_JITTER, step=step) - 1.0)
    return (betas[0], *(min(1.0, max(0.0, beta + shift)) for beta in betas[1:]))


def with_own_drafts(inputs: Inputs, model: nn.Module, *, config: TrainConfig, step: int) -> Inputs:
    """Return the inputs with every draft sampled from the model's own predictions (one more forward, no gradient).

    Args:
        inputs: what the first pass reads: its drafts are noised by the schedule.
        model: a `TensorAR`.
        config: of the run.
        step: training step from 1 on; 0 is validation, whose drafts have temperature 1: what sampling shows by default,
            and the same measure for every `noise.draft_temperature`.
    """
    windows_BTK = draft_windows(
        model,
        inputs.windows_BTK,
        inputs.labels_B,
        temperature=1.0 if step == VALIDATION_STEP else config.noise.draft_temperature,
        seed=config.seed,
        step=step,
        sample_counters_B=inputs.counters_B,
    )
    return replace(inputs, windows_BTK=windows_BTK)


def uses_own_drafts(config: TrainConfig, *, step: int) -> bool:
    """Return whether the whole global batch of a step trains on own drafts: a draw of (seed, step)."""
    if config.model.window_size == 1:
        return False
    return _step_word(config, Purpose.OWN_DRAFT_STEPS, step=step) < int(config.noise.own_draft_fraction * 2**64)


def _step_word(config: TrainConfig, purpose: Purpose, *, step: int) -> int:
    """Return 64 random bits, a draw of (seed, step)."""
    counter = np.array([step], dtype=np.int64)
    return int(random_words(seed=config.seed, purpose=purpose, stream=0, counters=counter)[0])


def _unit_draw(config: TrainConfig, purpose: Purpose, *, step: int) -> float:
    """Return a number in [0, 1), 53 bits of a draw of (seed, step)."""
    return (_step_word(config, purpose, step=step) >> 11) * 2.0**-53


def dropout_seed(config: TrainConfig, *, step: int, micro_step: int, rank: int) -> int:
    """Return the seed of torch's generator for one forward and backward: a draw of (seed, step, micro step, rank)."""
    counter = np.array([micro_step << 32 | rank], dtype=np.int64)
    word = random_words(seed=config.seed, purpose=Purpose.DROPOUT, stream=step, counters=counter)[0]
    return int(word >> np.uint64(1))
