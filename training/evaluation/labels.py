"""Label score: does a sample look like its class? Its rank among the class means of real features.

A mean that holds the sample itself is nearer to it than it should be, so real samples are ranked against their class
without them. Ties count against the sample. The real images' own score stands beside every other: it is what the
classes allow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.evaluation.neighbours import unit_vectors

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.integer]
AnyFeatures = npt.NDArray[np.floating]
UNRANKED = -1


@dataclass(frozen=True)
class ClassMeans:
    """Mean direction of each class's real features; made with `class_means`."""

    sums_CF: FloatArray
    """Sum of the unit features of each class; 0 for a class without samples."""
    counts_C: npt.NDArray[np.int64]
    """Samples of each class."""


def class_means(features_NF: AnyFeatures, labels_N: IntArray, *, num_classes: int) -> ClassMeans:
    """Return the class means of real samples, of features scaled to length 1.

    Args:
        features_NF: real samples.
        labels_N: in [0, num_classes).
        num_classes: C.

    Raises:
        ValueError: shapes that differ, or a label outside.
    """
    _check(features_NF, labels_N, num_classes=num_classes)
    sums_CF = np.zeros((num_classes, features_NF.shape[1]))
    np.add.at(sums_CF, labels_N, unit_vectors(features_NF))
    return ClassMeans(sums_CF=sums_CF, counts_C=np.bincount(labels_N, minlength=num_classes).astype(np.int64))


def label_ranks(means: ClassMeans, features_NF: AnyFeatures, labels_N: IntArray) -> npt.NDArray[np.int64]:
    """Return how many classes are at least as near to each sample as its own, (N,) in [0, C); 0 is a hit.

    Nearness is the cosine to the class mean; `UNRANKED` (-1) where the sample's class has no real samples.

    Args:
        means: of the real samples.
        features_NF: generated samples, or real ones that the means do not hold.
        labels_N: in [0, C).
    """
    _check(features_NF, labels_N, num_classes=len(means.counts_C))
    cosine_NC = _cosines(means, unit_vectors(features_NF))
    return _ranks(cosine_NC, labels_N, unranked_N=means.counts_C[labels_N] == 0)


def label_ranks_left_one_out(means: ClassMeans, features_NF: AnyFeatures, labels_N: IntArray) -> npt.NDArray[np.int64]:
    """Return the ranks of the samples that the means were made of, each against its class without it.

    `UNRANKED` (-1) for the only sample of a class.
    """
    _check(features_NF, labels_N, num_classes=len(means.counts_C))
    unit_NF = unit_vectors(features_NF)
    cosine_NC = _cosines(means, unit_NF)
    others_NF = means.sums_CF[labels_N] - unit_NF
    length_N = np.maximum(np.linalg.norm(others_NF, axis=1), np.finfo(np.float64).tiny)
    cosine_NC[np.arange(len(labels_N)), labels_N] = (others_NF * unit_NF).sum(axis=1) / length_N
    return _ranks(cosine_NC, labels_N, unranked_N=means.counts_C[labels_N] < 2)


def top_share(ranks_N: IntArray, *, top: int) -> float:
    """Return the share of ranked samples whose rank is below `top`, 0..1; nan without any.

    Args:
        ranks_N: of `label_ranks` or `caption_ranks`.
        top: 1 for top-1, 5 for top-5.
    """
    ranked = ranks_N[ranks_N != UNRANKED]
    return float((ranked < top).mean()) if len(ranked) else float("nan")


def _cosines(means: ClassMeans, unit_NF: FloatArray) -> FloatArray:
    length_C = np.linalg.norm(means.sums_CF, axis=1)
    cosine_NC: FloatArray = unit_NF @ (means.sums_CF / np.where(length_C > 0, length_C, 1)[:, None]).T
    cosine_NC[:, means.counts_C == 0] = -np.inf
    return cosine_NC


def _ranks(cosine_NC: FloatArray, labels_N: IntArray, *, unranked_N: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    own_N1 = np.take_along_axis(cosine_NC, labels_N[:, None].astype(np.int64), axis=1)
    ranks_N: npt.NDArray[np.int64] = (cosine_NC >= own_N1).sum(axis=1) - 1
    ranks_N[unranked_N] = UNRANKED
    return ranks_N


def _check(features_NF: AnyFeatures, labels_N: IntArray, *, num_classes: int) -> None:
    if features_NF.ndim != 2 or labels_N.shape != (len(features_NF),) or labels_N.dtype.kind not in "iu":
        raise ValueError(
            f"label score: features must be (N, F) and labels N integers, got {features_NF.shape} and "
            f"{labels_N.dtype} {labels_N.shape}; pass one label per sample"
        )
    if len(labels_N) and not 0 <= labels_N.min() <= labels_N.max() < num_classes:
        raise ValueError(
            f"label score: labels must be in [0, {num_classes}), got {labels_N.min()}..{labels_N.max()}; "
            f"use the labels of the corpus"
        )
