"""The pictures of an evaluation, chosen and decoded: what its report shows, as one `pictures.npz`.

Samples of the model and of its control stand at the same places with the same labels, seeds and counters.

C classes, P pictures a class, K window_size; H, W, 3 as decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.philox import Int64Array
from pipeline.storage import Storage
from tokenization.tokenizer import Tokenizer
from training.evaluation.adm_npz import write_adm_npz
from training.evaluation.config import ShownConfig
from training.evaluation.image_features import TrainingImages
from training.evaluation.memorised import Memorised
from training.evaluation.samples import SampleSet
from training.evaluation.stages import write_arrays

SAMPLES_NAME = "samples.npz"
PICTURES_NAME = "pictures.npz"
SAMPLES_AT_A_TIME = 256
"""That are decoded and in memory together."""


@dataclass(frozen=True, kw_only=True)
class ShownSamples:
    """Which samples are shown."""

    labels_C: Int64Array
    """Classes of the grid, the most frequent first."""
    grid_C_P: list[list[int]]
    """Sample indices of each class; fewer than P where the set has fewer."""
    strips: list[int]
    """Sample indices whose refinements are shown."""

    @property
    def grid(self) -> Int64Array:
        """Sample indices of the grid, one class after the other."""
        return np.array([index for indices in self.grid_C_P for index in indices], dtype=np.int64)


def choose_shown(labels_N: Int64Array, *, shown: ShownConfig) -> ShownSamples:
    """Return the samples to show: the first of the most frequent classes, and strips of one class after the other."""
    labels, counts = np.unique(labels_N, return_counts=True)
    order = np.argsort(-counts, kind="stable")[: shown.num_labels]
    grid = [np.flatnonzero(labels_N == label)[: shown.num_per_label].tolist() for label in labels[order]]
    turns = [indices[turn] for turn in range(shown.num_per_label) for indices in grid if turn < len(indices)]
    return ShownSamples(labels_C=labels[order].astype(np.int64), grid_C_P=grid, strips=turns[: shown.num_strips])


def decode_strips(samples: SampleSet, indices: list[int], *, tokenizer: Tokenizer) -> np.ndarray:
    """Return the refinements of some samples decoded, (n, K, H, W, 3), first drafts to finals."""
    refinements_NKT = samples.drafts_NTK[indices].transpose(0, 2, 1)
    num_strips, window_size, num_codes = refinements_NKT.shape
    images_NHWC = tokenizer.decode(refinements_NKT.reshape(-1, num_codes))
    return images_NHWC.reshape(num_strips, window_size, *images_NHWC.shape[1:])


def write_samples(storage: Storage, samples: SampleSet, *, tokenizer: Tokenizer) -> None:
    """Commit all samples decoded as `samples.npz`, in the layout of ADM's evaluator."""
    if storage.find(SAMPLES_NAME) is not None:
        return
    codes_NT = samples.codes_NT
    batches = (
        tokenizer.decode(codes_NT[begin : begin + SAMPLES_AT_A_TIME])
        for begin in range(0, len(codes_NT), SAMPLES_AT_A_TIME)
    )
    with storage.stage(SAMPLES_NAME) as staged_path:
        write_adm_npz(staged_path, batches, num_images=len(codes_NT))


def write_pictures(
    storage: Storage,
    samples: SampleSet,
    control_grid: SampleSet | None,
    *,
    shown: ShownSamples,
    memorised: Memorised | None,
    tokenizer: Tokenizer,
    training_images: TrainingImages | None,
) -> dict[str, Any]:
    """Commit `pictures.npz`, and return what its pictures are, as JSON values.

    Args:
        storage: where to.
        samples: of the model.
        control_grid: the control's samples at the places of the grid.
        shown: which of them.
        memorised: which pairs of samples and training images.
        tokenizer: decodes them.
        training_images: those of the pairs.
    """
    arrays = {"grid": tokenizer.decode(samples.codes_NT[shown.grid])}
    if control_grid is not None:
        arrays["control_grid"] = tokenizer.decode(control_grid.codes_NT)
    if samples.drafts_NTK.shape[2] > 1:
        arrays["strips"] = decode_strips(samples, shown.strips, tokenizer=tokenizer)
    if memorised is not None and training_images is not None and len(memorised.sample_indices_N):
        arrays["nearest_samples"] = tokenizer.decode(samples.codes_NT[memorised.sample_indices_N])
        arrays["nearest_training"] = training_images.decode(memorised.training_indices_N)
    write_arrays(storage, PICTURES_NAME, arrays)
    return {
        "grid": [
            {"label": label, "num_pictures": len(indices)}
            for label, indices in zip(shown.labels_C.tolist(), shown.grid_C_P, strict=True)
        ],
        "strip_labels": samples.labels_N[shown.strips].tolist() if "strips" in arrays else [],
        "nearest": [] if memorised is None else _pairs(memorised, samples),
    }


def _pairs(memorised: Memorised, samples: SampleSet) -> list[dict[str, Any]]:
    return [
        {"label": int(samples.labels_N[index]), "distance": distance}
        for index, distance in zip(memorised.sample_indices_N, memorised.distances_N, strict=True)
    ]
