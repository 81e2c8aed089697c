"""Nearest neighbours in feature space: precision, recall, density, coverage, and samples that repeat a training image.

Distances are computed block by block in float64, so memory is O(N * BLOCK) and the same vector is at distance 0 to
within 1e-7 of its length. A ball is closed (<=) and a sample is never its own neighbour, by position, not by value:
two equal images are each other's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
AnyFeatures = npt.NDArray[np.floating]
BLOCK = 1024
NUM_NEIGHBOURS = 3


@dataclass(frozen=True)
class ManifoldScores:
    """How two sets cover each other; each is the mean of an array, so that intervals can be drawn from it."""

    inside_M: npt.NDArray[np.bool_]
    """Per generated sample: lies within the k-th neighbour's distance of a real one."""
    reached_N: npt.NDArray[np.bool_]
    """Per real sample: lies within the k-th neighbour's distance of a generated one."""
    density_M: FloatArray
    """Per generated sample: real balls that hold it, over k."""
    covered_N: npt.NDArray[np.bool_]
    """Per real sample: its own ball holds a generated one."""

    @property
    def precision(self) -> float:
        """Share of generated samples that look real, 0..1."""
        return float(self.inside_M.mean())

    @property
    def recall(self) -> float:
        """Share of real samples that the generated ones reach, 0..1."""
        return float(self.reached_N.mean())

    @property
    def density(self) -> float:
        """Mean density; 1 in expectation for two halves of one set, may be above."""
        return float(self.density_M.mean())

    @property
    def coverage(self) -> float:
        """Share of real samples with a generated one in their ball, 0..1."""
        return float(self.covered_N.mean())


@dataclass(frozen=True)
class Nearest:
    """The nearest reference of every sample."""

    index_N: npt.NDArray[np.int64]
    """Position in the references; the first of equally near ones."""
    cosine_distance_N: FloatArray
    """1 - cosine of the angle between the two, 0..2."""


def manifold_scores(real_NF: AnyFeatures, generated_MF: AnyFeatures, *, k: int = NUM_NEIGHBOURS) -> ManifoldScores:
    """Return precision, recall, density and coverage of generated samples, with Euclidean distances.

    All depend on N and M: compare only at equal numbers, with two halves of real images beside it.

    Args:
        real_NF: more than k samples.
        generated_MF: more than k samples.
        k: the radius of a sample's ball is the distance to its k-th nearest other sample of its own set.

    Raises:
        ValueError: too few samples, or two widths.

    Source: Kynkaanniemi et al. 2019, equation 2 (precision, recall; k = 3); Naeem et al. 2020 (density, coverage).
    """
    real_radius_N = neighbour_distances(real_NF, k=k)
    generated_radius_M = neighbour_distances(generated_MF, k=k)
    inside_M = np.zeros(len(generated_MF), dtype=np.int64)
    reached_N = np.zeros(len(real_NF), dtype=np.bool_)
    covered_N = np.zeros(len(real_NF), dtype=np.bool_)
    for begin, distance_BM in _distances(real_NF, generated_MF):
        block = slice(begin, begin + len(distance_BM))
        holds_BM = distance_BM <= real_radius_N[block, None]
        inside_M += holds_BM.sum(axis=0)
        covered_N[block] = holds_BM.any(axis=1)
        reached_N[block] = (distance_BM <= generated_radius_M).any(axis=1)
    return ManifoldScores(inside_M=inside_M > 0, reached_N=reached_N, density_M=inside_M / k, covered_N=covered_N)


def neighbour_distances(features_NF: AnyFeatures, *, k: int) -> FloatArray:
    """Return the Euclidean distance of each sample to its k-th nearest other sample, (N,).

    Raises:
        ValueError: not more than k samples.
    """
    if k < 1 or len(features_NF) <= k:
        raise ValueError(
            f"neighbour distances: a set needs more than k samples and k >= 1, got {len(features_NF)} and k = {k}; "
            f"use more samples or a smaller k"
        )
    radius_N = np.empty(len(features_NF))
    for begin, distance_BN in _distances(features_NF, features_NF):
        _remove_self(distance_BN, begin=begin)
        radius_N[begin : begin + len(distance_BN)] = np.partition(distance_BN, k - 1, axis=1)[:, k - 1]
    return radius_N


def nearest(samples_NF: AnyFeatures, references_MF: AnyFeatures) -> Nearest:
    """Return the nearest reference of each sample by cosine distance, e.g. the training image that it looks like most.

    Raises:
        ValueError: no reference, two widths, or a vector of length 0.
    """
    return _nearest(samples_NF, references_MF, are_the_same=False)


def nearest_other(references_MF: AnyFeatures) -> Nearest:
    """Return the nearest *other* reference of each one, by cosine distance.

    Raises:
        ValueError: fewer than 2 references, or a vector of length 0.
    """
    if len(references_MF) < 2:
        raise ValueError(f"nearest other: there must be at least 2 references, got {len(references_MF)}; use more")
    return _nearest(references_MF, references_MF, are_the_same=True)


def near_duplicate_threshold(references_MF: AnyFeatures, *, quantile: float = 0.01) -> float:
    """Return the cosine distance below which a sample counts as a repeated training image.

    It is the `quantile` of each training image's distance to its nearest other one: nearer than all but that share of
    the training images are to each other. References must have gone through the tokenizer as the samples have: a
    memorised sample is the reconstruction of a training image, not the image. Of 332 reconstructed emoji of the
    training set none is near its original by this rule, all are near their reconstruction, and 3 of 332 held-out ones
    (the corpus holds twins) are near the reconstruction of a training image.

    Args:
        references_MF: features of the training images, reconstructed.
        quantile: in [0, 1]; the share of training images that would be called repeated.
    """
    return float(np.quantile(nearest_other(references_MF).cosine_distance_N, quantile))


def num_near_duplicates(nearest_of_samples: Nearest, *, threshold: float) -> int:
    """Return how many samples are nearer to a reference than `threshold`, or at distance 0.

    Print the number for held-out real images beside it: twins of training images, which a corpus may hold, count too.
    """
    return int(is_near_duplicate(nearest_of_samples.cosine_distance_N, threshold=threshold).sum())


def is_near_duplicate(cosine_distance_N: FloatArray, *, threshold: float) -> npt.NDArray[np.bool_]:
    """Return which distances are below the threshold, or 0."""
    return (cosine_distance_N < threshold) | (cosine_distance_N <= 1e-9)


def unit_vectors(vectors_NF: AnyFeatures) -> FloatArray:
    """Return the vectors scaled to length 1, in float64.

    Raises:
        ValueError: a vector of length 0, or one that is not finite.
    """
    vectors_NF = vectors_NF.astype(np.float64)
    length_N1 = np.linalg.norm(vectors_NF, axis=1, keepdims=True)
    if not ((length_N1 > 0) & np.isfinite(length_N1)).all():
        raise ValueError("unit vectors: every length must be finite and above 0, got 0, nan or inf; look at the images")
    unit_NF: FloatArray = vectors_NF / length_N1
    return unit_NF


def _nearest(samples_NF: AnyFeatures, references_MF: AnyFeatures, *, are_the_same: bool) -> Nearest:
    samples_NF, references_MF = unit_vectors(samples_NF), unit_vectors(references_MF)
    index_N = np.empty(len(samples_NF), dtype=np.int64)
    distance_N = np.empty(len(samples_NF))
    for begin, distance_BM in _distances(samples_NF, references_MF):
        if are_the_same:
            _remove_self(distance_BM, begin=begin)
        block = slice(begin, begin + len(distance_BM))
        index_N[block] = distance_BM.argmin(axis=1)
        distance_N[block] = np.square(distance_BM.min(axis=1)) / 2
    return Nearest(index_N=index_N, cosine_distance_N=distance_N)


def _distances(a_NF: AnyFeatures, b_MF: AnyFeatures) -> Iterator[tuple[int, FloatArray]]:
    """Yield the distances of `BLOCK` vectors of `a` at a time to all of `b`, with the first one's position."""
    if a_NF.ndim != 2 or b_MF.ndim != 2 or a_NF.shape[1] != b_MF.shape[1] or not len(b_MF):
        raise ValueError(
            f"distances of features: both sets must be (N, F) of one F, not empty, got {a_NF.shape} and {b_MF.shape}; "
            f"extract both with one network"
        )
    b_MF = b_MF.astype(np.float64)
    squares_M = np.square(b_MF).sum(axis=1)
    for begin in range(0, len(a_NF), BLOCK):
        block_BF = a_NF[begin : begin + BLOCK].astype(np.float64)
        squared_BM = np.square(block_BF).sum(axis=1)[:, None] + squares_M - 2 * (block_BF @ b_MF.T)
        yield begin, np.sqrt(np.maximum(squared_BM, 0))


def _remove_self(distance_BN: FloatArray, *, begin: int) -> None:
    rows = np.arange(len(distance_BN))
    distance_BN[rows, begin + rows] = np.inf
