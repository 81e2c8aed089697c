"""The pictures of an evaluation, chosen and decoded: what its report shows, as one `pictures.npz`.

Samples of the model and of its control stand at the same places with the same labels, seeds and counters.

C classes, P pictures a class, K window_size; H, W, 3 as decoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.philox import Int64Array
from tokenization.tokenizer import Tokenizer
from training.evaluation.config import ShownConfig
from training.evaluation.samples import SampleSet


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
