"""Samples against real images: distances, precision and recall, scores; each beside what real images come to.

Invariant: a measure that depends on the number of images is taken on equally many samples, real images of the tuning
half (`real`) and reconstructions of them (`decoded`), all against the whole report half. These are marks and no bounds:
the two halves have no group in common, while a model may have been trained on images of the report half, and sharpened
samples trade recall for precision above the mark. Distances to the decoded report half leave the tokenizer out.

N samples, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.philox import Int64Array
from training.evaluation.captions import caption_ranks, fit_caption_map
from training.evaluation.distances import frechet_distance, kernel_distance
from training.evaluation.held_out import spread_indices
from training.evaluation.image_features import FloatFeatures, Reference
from training.evaluation.intervals import Distance, Intervals
from training.evaluation.labels import UNRANKED, class_means, label_ranks, label_ranks_left_one_out
from training.evaluation.neighbours import manifold_scores
from training.evaluation.samples import SampleSet

DISTANCES: dict[str, Distance] = {"frechet_distance": frechet_distance, "kernel_distance": kernel_distance}
TOP = (1, 5)

Embed = Callable[[Sequence[str]], FloatFeatures]


def compared_sets(samples: SampleSet, reference: Reference) -> dict[str, FloatFeatures]:
    """Return the features that are held against the report half: as many of samples, real and decoded images."""
    count = min(len(samples.features_NF), len(reference.tuning.real_NF))
    return {
        "samples": samples.features_NF[spread_indices(count, of=len(samples.features_NF))],
        "real": reference.tuning.real_NF[:count],
        "decoded": reference.tuning.decoded_NF[:count],
    }


def distances_of(
    name: str, sets: dict[str, FloatFeatures], *, reference: Reference, intervals: Intervals
) -> dict[str, Any]:
    """Return a distance of `DISTANCES` of every set to the report half."""
    return {
        of: intervals.of_distance(DISTANCES[name], features_NF, reference.report.real_NF)
        for of, features_NF in sets.items()
    }


def distances_to_decoded(
    name: str, sets: dict[str, FloatFeatures], *, reference: Reference, intervals: Intervals
) -> dict[str, Any]:
    """Return a distance of `DISTANCES` of samples and decoded images to the decoded report half."""
    return {
        of: intervals.of_distance(DISTANCES[name], sets[of], reference.report.decoded_NF)
        for of in ("samples", "decoded")
    }


def manifold_of(
    sets: dict[str, FloatFeatures], *, reference: Reference, intervals: Intervals
) -> dict[str, dict[str, Any]]:
    """Return precision, recall, density and coverage of every set, by measure and then by set."""
    found: dict[str, dict[str, Any]] = {"precision": {}, "recall": {}, "density": {}, "coverage": {}}
    for of, features_NF in sets.items():
        scores = manifold_scores(reference.report.real_NF, features_NF)
        found["precision"][of] = intervals.of_mean(scores.inside_M)
        found["recall"][of] = intervals.of_mean(scores.reached_N)
        found["density"][of] = intervals.of_mean(scores.density_M)
        found["coverage"][of] = intervals.of_mean(scores.covered_N)
    return found


def label_score(samples: SampleSet, reference: Reference, *, num_classes: int, intervals: Intervals) -> dict[str, Any]:
    """Return the share of images whose class is the nearest (`top_1`) or among the nearest five, overall and by class.

    Classes are means over all labelled real images; a real image is ranked against its class without itself.

    Args:
        samples: ranked.
        reference: gives the classes, and is ranked as well.
        num_classes: of the model.
        intervals: makes them.
    """
    real_NF = np.concatenate([reference.tuning.real_NF, reference.report.real_NF])
    labels_N = np.concatenate([reference.tuning.labels_N, reference.report.labels_N])
    real_NF, labels_N = real_NF[labels_N >= 0], labels_N[labels_N >= 0]
    means = class_means(real_NF, labels_N, num_classes=num_classes)
    ranked = {
        "samples": _ranked(label_ranks(means, samples.features_NF, samples.labels_N), samples.labels_N),
        "real": _ranked(label_ranks_left_one_out(means, real_NF, labels_N), labels_N),
    }
    return _score(ranked, intervals=intervals)


def caption_score(
    samples: SampleSet,
    reference: Reference,
    *,
    embed: Embed,
    class_captions: Sequence[str],
    penalty: float,
    intervals: Intervals,
) -> dict[str, Any]:
    """Return the share of images whose class's caption is the nearest (`top_1`) or among the nearest five.

    Nearest to what a map makes of an image's features; it is fitted to the decoded images of the tuning half and their
    own captions. Beside samples stand the decoded images of the report half, whose concepts the map has not seen.

    Args:
        samples: ranked.
        reference: gives the map, and its report half is ranked as well.
        embed: texts to embeddings, (N, E).
        class_captions: in label order, no two alike.
        penalty: of the map, see `fit_caption_map`.
        intervals: makes them.
    """
    tuning, report = reference.tuning, reference.report
    has_caption_N = tuning.captions_N != ""
    captions, caption_of_image_N = np.unique(tuning.captions_N[has_caption_N], return_inverse=True)
    embeddings_PE, candidates_CE = np.split(embed([*captions, *class_captions]), [len(captions)])
    caption_map = fit_caption_map(tuning.decoded_NF[has_caption_N], embeddings_PE[caption_of_image_N], penalty=penalty)
    has_label_N = report.labels_N >= 0
    ranked = {
        of: (caption_ranks(caption_map, features_NF, candidates_CE=candidates_CE, captions_N=labels_N), labels_N)
        for of, features_NF, labels_N in (
            ("samples", samples.features_NF, samples.labels_N),
            ("decoded", report.decoded_NF[has_label_N], report.labels_N[has_label_N]),
        )
    }
    return {"num_captions": len(captions), **_score(ranked, intervals=intervals)}


def distance_of_class(
    features_NF: FloatFeatures, labels_N: Int64Array, *, reference: Reference, intervals: Intervals
) -> dict[str, Any]:
    """Return the kernel distance of a set to the report half, of each class that has enough images in both."""
    has_label_N = labels_N >= 0
    return intervals.of_distance_by_class(
        kernel_distance,
        features_NF[has_label_N],
        reference.report.real_NF,
        labels_N=labels_N[has_label_N],
        labels_M=reference.report.labels_N,
    )


def _score(
    ranked: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]], *, intervals: Intervals
) -> dict[str, Any]:
    """Return the shares of images that are ranked first, and among the first five, of ranks and labels by set."""
    score: dict[str, Any] = {
        f"top_{top}": {of: intervals.of_mean(ranks_N < top) for of, (ranks_N, _) in ranked.items()} for top in TOP
    }
    score["top_1_of_class"] = {
        of: intervals.of_mean_by_class(ranks_N < 1, labels) for of, (ranks_N, labels) in ranked.items()
    }
    return score


def _ranked(
    ranks_N: npt.NDArray[np.int64], labels_N: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    is_ranked_N = ranks_N != UNRANKED
    return ranks_N[is_ranked_N], labels_N[is_ranked_N]
