"""Measures with their intervals as JSON values: means over samples, and distances between sets, overall and by class.

An interval is `value`, `low`, `high` and `num_samples` of each set; which way it is made is the measure's, see
`training.evaluation.bootstrap`.

N samples, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.philox import Int64Array
from training.evaluation.bootstrap import Interval, interval, intervals_by_group
from training.evaluation.config import BootstrapConfig
from training.evaluation.image_features import FloatFeatures

Distance = Callable[[FloatFeatures, FloatFeatures], float]


class Intervals:
    """Makes intervals, all with the same draws, so that two models' differences pair."""

    def __init__(self, bootstrap: BootstrapConfig, *, seed: int) -> None:
        """Keep how many draws there are, and their seed."""
        self._bootstrap, self._seed = bootstrap, seed

    def of_mean(self, values_N: npt.NDArray[Any], *, groups_N: Int64Array | None = None) -> dict[str, Any] | None:
        """Return the mean of numbers, one a sample; none where there are no samples.

        Args:
            values_N: the numbers.
            groups_N: in [0, G), the group of each sample; groups are drawn whole then. None draws single samples.
        """
        if not len(values_N):
            return None
        groups = np.arange(len(values_N), dtype=np.int64) if groups_N is None else groups_N
        sums_G, counts_G = np.bincount(groups, weights=values_N), np.bincount(groups)
        found = interval(
            lambda places: float(sums_G[places].sum() / counts_G[places].sum()),
            [len(counts_G)],
            method="replacement",
            seed=self._seed,
            num_draws=self._bootstrap.num_resamples,
        )
        grouped = {} if groups_N is None else {"num_groups": len(counts_G)}
        return _json(found) | {"num_samples": [len(values_N)]} | grouped

    def of_mean_by_class(self, values_N: npt.NDArray[Any], labels_N: Int64Array) -> dict[str, Any]:
        """Return the mean of each class that has enough samples, by its label as text."""
        found = intervals_by_group(
            lambda places: float(values_N[places].mean()),
            [np.asarray(labels_N).tolist()],
            method="replacement",
            seed=self._seed,
            num_draws=self._bootstrap.num_resamples,
            min_samples=self._bootstrap.min_per_class,
        )
        return {str(label): _json(found[label]) for label in sorted(found)}

    def of_distance(self, distance: Distance, a_NF: FloatFeatures, b_MF: FloatFeatures) -> dict[str, Any]:
        """Return a distance between two sets of features."""
        found = interval(
            lambda a_places, b_places: distance(a_NF[a_places], b_MF[b_places]),
            [len(a_NF), len(b_MF)],
            method="halves",
            seed=self._seed,
            num_draws=self._bootstrap.num_resamples,
        )
        return _json(found)

    def of_distance_by_class(
        self,
        distance: Distance,
        a_NF: FloatFeatures,
        b_MF: FloatFeatures,
        *,
        labels_N: Int64Array,
        labels_M: Int64Array,
    ) -> dict[str, Any]:
        """Return the distance of each class that has enough samples in both sets, by its label as text."""
        found = intervals_by_group(
            lambda a_places, b_places: distance(a_NF[a_places], b_MF[b_places]),
            [np.asarray(labels_N).tolist(), np.asarray(labels_M).tolist()],
            method="halves",
            seed=self._seed,
            num_draws=self._bootstrap.num_resamples,
            min_samples=self._bootstrap.min_per_class,
        )
        return {str(label): _json(found[label]) for label in sorted(found)}


def _json(found: Interval) -> dict[str, Any]:
    return {"value": found.value, "low": found.low, "high": found.high, "num_samples": list(found.num_samples)}
