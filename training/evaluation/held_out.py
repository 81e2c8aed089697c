"""Held-out cross-entropy and accuracy per offset, with three kinds of drafts in the windows, sample by sample.

Invariant: every model is scored on the same samples with the same draws, so that differences between models, and
between kinds of drafts, are paired. The kinds: `schedule` (noised as training does; half of its drafts may be the
truth), `own_drafts` (what sampling shows the model: this is the one that counts) and `uninformed` (every draft a
uniform draw, so that nothing is given away). Costs four forward passes of the samples, one at window_size 1.

B batch, T positions, K window_size, N samples, R predictions scored of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.philox import Int64Array
from pipeline.shard_set import ShardSet
from pipeline.storage import ArtifactError
from training.config import NoiseConfig
from training.cross_entropy import HeadLoss, head_cross_entropy, wide_dtype
from training.evaluation.stages import Array, Arrays
from training.gpt import evaluation_mode
from training.noise import beta_of_offset, draft_windows, drop_labels, noise_windows
from training.scored import Scored, score_predictions
from training.tensorar import TensorAR

KINDS = ("schedule", "own_drafts", "uninformed")
UNINFORMED = NoiseConfig(schedule="full")
_STEP = 0
"""The step that keys the draws, as in the validation of a run: training begins at step 1."""


def spread_indices(num_samples: int, *, of: int) -> Int64Array:
    """Return the indices of `num_samples` samples spread evenly over `of`; all where there are fewer."""
    count = min(num_samples, of)
    return np.arange(count, dtype=np.int64) * of // count


def score_held_out(
    model: TensorAR, shard_set: ShardSet, sample_indices: Int64Array, *, noise: NoiseConfig, seed: int
) -> Arrays:
    """Return what a model makes of some held-out samples, view 0 of each.

    Args:
        model: on any device.
        shard_set: of codes of the model's shape.
        sample_indices: which samples; they key the draws.
        noise: of `schedule`.
        seed: of the draws.

    Returns:
        `loss_KIND` (N, K) float64, mean cross-entropy in nats of each sample at each offset over the predictions
        inside the image; `accuracy_KIND` (N, K) float64, share of them whose largest logit is the target's. At
        window_size 1 the kinds are equal.

    Raises:
        ArtifactError: a sample is damaged, or its label is not one of the model's classes.
    """
    device = next(model.parameters()).device
    codes, labels = shard_set.read_batch(sample_indices, views=np.zeros_like(sample_indices))
    codes_BT, counters_B = (torch.from_numpy(array).to(device) for array in (codes, sample_indices))
    labels_B = drop_labels(
        torch.from_numpy(labels).to(device),
        fraction=0.0,
        null_label=model.null_label,
        seed=seed,
        step=_STEP,
        sample_counters_B=counters_B,
    )
    _check_labels(labels, shard_set=shard_set, num_classes=model.config.num_classes)
    scored = score_predictions(codes_BT, window_size=model.config.window_size)
    arrays: Arrays = {}
    with evaluation_mode(model):
        for kind, windows_BTK in _windows_of_kinds(model, codes_BT, labels_B, counters_B, noise=noise, seed=seed):
            losses_BK, accuracies_BK = _score(model, windows_BTK, labels_B, scored=scored)
            arrays[f"loss_{kind}"], arrays[f"accuracy_{kind}"] = losses_BK, accuracies_BK
    for kind in KINDS[1:]:  # a window of one code holds no drafts of any kind
        for measure in ("loss", "accuracy"):
            arrays.setdefault(f"{measure}_{kind}", arrays[f"{measure}_schedule"])
    return arrays


def _check_labels(labels_B: Int64Array, *, shard_set: ShardSet, num_classes: int) -> None:
    if labels_B.max(initial=-1) >= num_classes:
        raise ArtifactError(
            f"evaluate on {shard_set.url}: labels must be below the model's num_classes = {num_classes}, got "
            f"{labels_B.max()}; use held-out codes of the classes that it was trained on"
        )


def _windows_of_kinds(
    model: TensorAR, codes_BT: Tensor, labels_B: Tensor, counters_B: Tensor, *, noise: NoiseConfig, seed: int
) -> Iterator[tuple[str, Tensor]]:
    noised: Callable[..., Tensor] = partial(
        noise_windows,
        codes_BT,
        codebook_size=model.config.codebook_size,
        seed=seed,
        step=_STEP,
        sample_counters_B=counters_B,
    )
    window_size = model.config.window_size
    windows_BTK = noised(betas=beta_of_offset(noise, window_size=window_size), coupling=noise.coupling)
    yield "schedule", windows_BTK
    if window_size == 1:
        return
    yield (
        "own_drafts",
        draft_windows(model, windows_BTK, labels_B, seed=seed, step=_STEP, sample_counters_B=counters_B),
    )
    yield "uninformed", noised(betas=beta_of_offset(UNINFORMED, window_size=window_size), coupling="independent")


def _score(model: TensorAR, windows_BTK: Tensor, labels_B: Tensor, *, scored: Scored) -> tuple[Array, Array]:
    parts: HeadLoss = model(windows_BTK, labels_B, scored=scored, readout=partial(_read, scored))
    losses_BK, accuracies_BK = (
        torch.stack([part.double().mean(1) for part in torch.split(x_BR, list(scored.num_of_offset), dim=1)], dim=1)
        for x_BR in (parts.entropies, parts.hits)
    )
    return losses_BK.cpu().numpy(), accuracies_BK.cpu().numpy()


def _read(scored: Scored, states_BRD: Tensor, weight_VD: Tensor) -> HeadLoss:
    row_weights_BR = torch.ones(scored.targets_BR.shape, dtype=wide_dtype(states_BRD.dtype), device=states_BRD.device)
    return head_cross_entropy(states_BRD, weight_VD, targets=scored.targets_BR, row_weights=row_weights_BR)
