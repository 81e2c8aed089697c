"""Distances between two sets of features: Frechet (Heusel et al. 2017) and kernel (Binkowski et al. 2018).

Both are computed in float64 and exactly: no matrix square root, no subsets. The Frechet distance is biased upwards, the
more the fewer samples there are: compare only at equal numbers, and print two halves of real images beside it. The
kernel distance is unbiased, so it may be negative where the sets are alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
AnyFeatures = npt.NDArray[np.floating]
KERNEL_DEGREE = 3


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a set of features: all that the Frechet distance knows of it."""

    mean_F: FloatArray
    """(F,)."""
    covariance_FF: FloatArray
    """(F, F), with N - 1 as divisor."""


def frechet_distance(a_NF: AnyFeatures, b_MF: AnyFeatures) -> float:
    """Return |mean_a - mean_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)) of two sets of features.

    The last term is the sum of the singular values of A B^T, where S_a = A^T A and S_b = B^T B with A and B the centred
    features over sqrt(N - 1). A and B are first brought down to at most F rows by QR, so that the matrix has at most
    min(N, F) x min(M, F) entries: exact for any N, M and F, also for singular covariances, where `sqrtm` is not.

    Args:
        a_NF: at least 2 samples; finite.
        b_MF: at least 2 samples; finite.

    Raises:
        ValueError: too few samples, two widths, or features that are not finite.

    Source: Heusel et al. 2017, equation 6 (FID, with the features of an Inception network).
    """
    _check(a_NF, b_MF, measuring="frechet distance")
    mean_a, factor_a = _mean_and_factor(a_NF)
    mean_b, factor_b = _mean_and_factor(b_MF)
    return _distance(mean_a, factor_a, mean_b, factor_b)


def moments_of(features_NF: AnyFeatures) -> Moments:
    """Return mean and covariance of at least 2 samples, in float64."""
    _check(features_NF, features_NF, measuring="moments")
    covariance_FF = np.atleast_2d(np.cov(features_NF.astype(np.float64), rowvar=False))
    return Moments(mean_F=features_NF.mean(axis=0, dtype=np.float64), covariance_FF=covariance_FF)


def frechet_distance_of_moments(a: Moments, b: Moments) -> float:
    """Return the Frechet distance of two sets of which only the moments are known, as of ADM's reference files.

    Factors of the covariances come from their eigenvectors; eigenvalues below 0, which rounding makes, count as 0.

    Raises:
        ValueError: two widths.
    """
    if a.mean_F.shape != b.mean_F.shape:
        raise ValueError(
            f"frechet distance: both sets must have features of one width, got {a.mean_F.shape} and {b.mean_F.shape}; "
            f"use moments of the same network"
        )
    return _distance(a.mean_F, _factor_of_covariance(a), b.mean_F, _factor_of_covariance(b))


def kernel_distance(a_NF: AnyFeatures, b_MF: AnyFeatures) -> float:
    """Return the unbiased estimate of MMD^2 with the kernel (x.y / F + 1)^3, of the whole sets.

    Published KIDs average it over 100 subsets of 1,000 samples: the same expectation; the whole sets have less variance
    and no draw. Time and memory are O((N + M)^2) and O(N^2) float64.

    Args:
        a_NF: at least 2 samples; finite.
        b_MF: at least 2 samples; finite.

    Raises:
        ValueError: too few samples, two widths, or features that are not finite.

    Source: Binkowski et al. 2018, section 4 (KID), and Gretton et al. 2012, equation 3.
    """
    _check(a_NF, b_MF, measuring="kernel distance")
    wide_a_NF, wide_b_MF = a_NF.astype(np.float64), b_MF.astype(np.float64)
    across = float(_kernel(wide_a_NF, wide_b_MF).mean())
    return _mean_of_pairs(wide_a_NF) + _mean_of_pairs(wide_b_MF) - 2 * across


def _mean_and_factor(features_NF: AnyFeatures) -> tuple[FloatArray, FloatArray]:
    mean_F: FloatArray = features_NF.mean(axis=0, dtype=np.float64)
    factor_NF: FloatArray = (features_NF.astype(np.float64) - mean_F) / np.sqrt(len(features_NF) - 1)
    if factor_NF.shape[0] > factor_NF.shape[1]:
        factor_NF = np.asarray(np.linalg.qr(factor_NF, "r"))  # an array in this mode; numpy's stub says otherwise
    return mean_F, factor_NF


def _factor_of_covariance(moments: Moments) -> FloatArray:
    values_F, vectors_FF = np.linalg.eigh(moments.covariance_FF)
    factor_FF: FloatArray = np.sqrt(np.maximum(values_F, 0))[:, None] * vectors_FF.T
    return factor_FF


def _distance(mean_a: FloatArray, factor_a: FloatArray, mean_b: FloatArray, factor_b: FloatArray) -> float:
    traces = np.square(factor_a).sum() + np.square(factor_b).sum()
    overlap = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    return float(np.square(mean_a - mean_b).sum() + traces - 2 * overlap)


def _kernel(a_NF: FloatArray, b_MF: FloatArray) -> FloatArray:
    kernel_NM: FloatArray = (a_NF @ b_MF.T / a_NF.shape[1] + 1) ** KERNEL_DEGREE
    return kernel_NM


def _mean_of_pairs(a_NF: FloatArray) -> float:
    kernel_NN = _kernel(a_NF, a_NF)
    count = len(a_NF)
    return float((kernel_NN.sum() - np.trace(kernel_NN)) / (count * (count - 1)))


def _check(a_NF: AnyFeatures, b_MF: AnyFeatures, *, measuring: str) -> None:
    if a_NF.ndim != 2 or b_MF.ndim != 2 or a_NF.shape[1] != b_MF.shape[1] or min(len(a_NF), len(b_MF)) < 2:
        raise ValueError(
            f"{measuring}: both sets must be (N, F) with N >= 2 and one F, got {a_NF.shape} and {b_MF.shape}; "
            f"extract more samples with one network"
        )
    if not (np.isfinite(a_NF).all() and np.isfinite(b_MF).all()):
        raise ValueError(f"{measuring}: features must be finite, got nan or inf; look at the images they come from")
