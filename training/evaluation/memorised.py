"""Samples that repeat a training image, counted, and the nearest ones found.

A sample counts as repeated where it is nearer to a training image than all but one in a hundred training images are to
each other. Beside it stands the same count for reconstructions of reference images: of held-out ones it says how many
twins the corpus has; of images that the model was trained on it is near 1 by design.

N samples, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.philox import Int64Array
from training.evaluation.image_features import FloatFeatures, Reference
from training.evaluation.neighbours import Nearest, near_duplicate_threshold, nearest, num_near_duplicates
from training.evaluation.samples import SampleSet


@dataclass(frozen=True, kw_only=True)
class Memorised:
    """What was found, and which pairs are worth a look."""

    summary: dict[str, Any]
    """JSON values: threshold, and by `samples` and `decoded` the count, number and share."""
    sample_indices_N: Int64Array
    """Samples nearest to a training image, the nearest first."""
    training_indices_N: Int64Array
    """The training image of each."""
    distances_N: list[float]
    """Cosine distance of each pair."""


def find_memorised(
    samples: SampleSet,
    reference: Reference,
    training_NF: FloatFeatures,
    *,
    num_views: int,
    num_nearest: int,
) -> Memorised:
    """Return how many samples repeat a training image, and the `num_nearest` nearest pairs.

    Args:
        samples: looked at.
        reference: whose decoded report half is looked at beside them.
        training_NF: features of the decoded training images, view by view of each.
        num_views: of each; only the first are compared with each other, or mirror images would be each other's twins.
        num_nearest: pairs to return.
    """
    threshold = near_duplicate_threshold(training_NF[::num_views])
    of_samples, of_decoded = (
        nearest(features_NF, training_NF) for features_NF in (samples.features_NF, reference.report.decoded_NF)
    )
    order = np.argsort(of_samples.cosine_distance_N, kind="stable")[:num_nearest]
    summary = {"threshold": threshold, "num_training_images": len(training_NF)}
    return Memorised(
        summary=summary | {"samples": _count(of_samples, threshold), "decoded": _count(of_decoded, threshold)},
        sample_indices_N=order.astype(np.int64),
        training_indices_N=of_samples.index_N[order],
        distances_N=of_samples.cosine_distance_N[order].tolist(),
    )


def _count(found: Nearest, threshold: float) -> dict[str, Any]:
    count, num_images = num_near_duplicates(found, threshold=threshold), len(found.index_N)
    median = float(np.median(found.cosine_distance_N))
    return {"count": count, "num_images": num_images, "share": count / num_images, "median_distance": median}
