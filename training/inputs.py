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
        betas=beta_of_offset(config.noise, window_size=config.model.window_size),
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


def with_own_drafts(inputs: Inputs, model: nn.Module, *, config: TrainConfig, step: int) -> Inputs:
    """Return the inputs with every draft sampled from the model's own predictions (one more forward, no gradient)."""
    windows_BTK = draft_windows(
        model,
        inputs.windows_BTK,
        inputs.labels_B,
        seed=config.seed,
        step=step,
        sample_counters_B=inputs.counters_B,
    )
    return replace(inputs, windows_BTK=windows_BTK)


def uses_own_drafts(config: TrainConfig, *, step: int) -> bool:
    """Return whether the whole global batch of a step trains on own drafts: a draw of (seed, step)."""
    if config.model.window_size == 1 or config.noise.own_draft_fraction == 0.0:
        return False
    counter = np.array([step], dtype=np.int64)
    word = int(random_words(seed=config.seed, purpose=Purpose.OWN_DRAFT_STEPS, stream=0, counters=counter)[0])
    return word < int(config.noise.own_draft_fraction * 2**64)


def dropout_seed(config: TrainConfig, *, step: int, micro_step: int, rank: int) -> int:
    """Return the seed of torch's generator for one forward and backward: a draw of (seed, step, micro step, rank)."""
    counter = np.array([micro_step << 32 | rank], dtype=np.int64)
    word = random_words(seed=config.seed, purpose=Purpose.DROPOUT, stream=step, counters=counter)[0]
    return int(word >> np.uint64(1))
