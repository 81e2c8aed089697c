"""Frechet and kernel distances: against scipy's matrix square root, closed forms on Gaussians, and loops over pairs."""

import numpy as np
import pytest
import scipy.linalg

from training.evaluation.distances import frechet_distance, frechet_distance_of_moments, kernel_distance, moments_of


def samples(seed: int, shape: tuple[int, int], *, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(seed + 100).normal(size=(shape[1], shape[1]))
    return (generator.normal(size=shape) @ mixing * scale + shift).astype(np.float32)


def by_sqrtm(a_NF: np.ndarray, b_MF: np.ndarray) -> float:
    a_NF, b_MF = a_NF.astype(np.float64), b_MF.astype(np.float64)
    covariance_a, covariance_b = np.cov(a_NF, rowvar=False), np.cov(b_MF, rowvar=False)
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b).real
    means = np.square(a_NF.mean(0) - b_MF.mean(0)).sum()
    return float(means + np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.trace(root))


@pytest.mark.parametrize(("count_a", "count_b"), [(200, 200), (40, 300), (300, 35), (33, 64)])
def test_frechet_distance_is_that_of_the_matrix_square_root(count_a: int, count_b: int) -> None:
    a_NF, b_MF = samples(0, (count_a, 30)), samples(1, (count_b, 30), shift=0.5, scale=1.3)
    assert frechet_distance(a_NF, b_MF) == pytest.approx(by_sqrtm(a_NF, b_MF), rel=1e-8)


def test_frechet_distance_is_exact_with_fewer_samples_than_dimensions() -> None:
    # Rank 9 and 12 of 40: sqrtm is no oracle here; the positive eigenvalues of the product are.
    a_NF, b_MF = samples(0, (10, 40)), samples(1, (13, 40))
    covariance_a, covariance_b = np.cov(a_NF.astype(float), rowvar=False), np.cov(b_MF.astype(float), rowvar=False)
    eigenvalues = np.sort(np.linalg.eigvals(covariance_a @ covariance_b).real)[-9:]
    means = np.square(a_NF.astype(float).mean(0) - b_MF.astype(float).mean(0)).sum()
    expected = means + np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(eigenvalues).sum()
    assert frechet_distance(a_NF, b_MF) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_gaussians_in_one_dimension_has_its_closed_form() -> None:
    # Means 2 and 6, standard deviations sqrt(2) and sqrt(32): 4^2 + (sqrt(32) - sqrt(2))^2 = 16 + 18.
    a_NF, b_MF = np.array([[1.0], [3.0]]), np.array([[2.0], [10.0]])
    assert frechet_distance(a_NF, b_MF) == pytest.approx(34.0, abs=1e-12)


def test_frechet_distance_of_a_set_to_itself_is_nothing_and_to_a_shifted_one_the_shift() -> None:
    a_NF = samples(3, (50, 20))
    assert frechet_distance(a_NF, a_NF) == pytest.approx(0.0, abs=1e-9)
    shifted_NF = a_NF.astype(np.float64) + 3.0
    assert frechet_distance(a_NF, shifted_NF) == pytest.approx(20 * 9.0, rel=1e-9)


@pytest.mark.parametrize("count", [12, 90])
def test_frechet_distance_of_moments_is_that_of_their_samples(count: int) -> None:
    a_NF, b_MF = samples(4, (count, 25)), samples(5, (70, 25), shift=1.0)
    assert frechet_distance_of_moments(moments_of(a_NF), moments_of(b_MF)) == pytest.approx(
        frechet_distance(a_NF, b_MF), rel=1e-6
    )


def test_frechet_distance_does_not_see_a_rotation_of_both_sets() -> None:
    a_NF, b_MF = samples(6, (60, 15)).astype(float), samples(7, (50, 15)).astype(float)
    rotation_FF = np.linalg.qr(np.random.default_rng(8).normal(size=(15, 15)))[0]
    assert frechet_distance(a_NF @ rotation_FF, b_MF @ rotation_FF) == pytest.approx(frechet_distance(a_NF, b_MF))


def test_kernel_distance_is_the_unbiased_mean_over_pairs() -> None:
    a_NF, b_MF = samples(9, (11, 5)).astype(float), samples(10, (8, 5), shift=0.4).astype(float)

    def kernel(x_F: np.ndarray, y_F: np.ndarray) -> float:
        return float((sum(x * y for x, y in zip(x_F, y_F, strict=True)) / 5 + 1) ** 3)

    within_a = [kernel(a_NF[i], a_NF[j]) for i in range(11) for j in range(11) if i != j]
    within_b = [kernel(b_MF[i], b_MF[j]) for i in range(8) for j in range(8) if i != j]
    across = [kernel(a_F, b_F) for a_F in a_NF for b_F in b_MF]
    expected = sum(within_a) / 110 + sum(within_b) / 56 - 2 * sum(across) / 88
    assert kernel_distance(a_NF, b_MF) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_of_one_distribution_is_zero_on_average() -> None:
    generator = np.random.default_rng(11)
    distances = [kernel_distance(generator.normal(size=(20, 4)), generator.normal(size=(20, 4))) for _ in range(400)]
    # A biased estimate, with the diagonal in it, would be about 1 here.
    assert abs(np.mean(distances)) < 4 * np.std(distances) / 20
    assert min(distances) < 0


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance])
def test_distances_of_float32_features_are_computed_in_float64(measure) -> None:
    # Far from the origin, as features of a network are: in float32 the small distance drowns in the rounding.
    a_NF, b_MF = samples(12, (300, 20), shift=30.0), samples(12, (600, 20), shift=30.0)[300:]
    assert measure(a_NF, b_MF) == pytest.approx(measure(a_NF.astype(np.float64), b_MF.astype(np.float64)), rel=1e-9)


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance])
def test_distances_refuse_what_they_cannot_compare(measure) -> None:
    good = np.zeros((3, 4))
    with pytest.raises(ValueError, match=r"got \(3, 4\) and \(3, 5\)"):
        measure(good, np.zeros((3, 5)))
    with pytest.raises(ValueError, match="N >= 2"):
        measure(good, good[:1])
    with pytest.raises(ValueError, match="must be finite"):
        measure(good, np.where(np.eye(3, 4) == 1, np.inf, good))
    with pytest.raises(ValueError, match="must be finite"):
        measure(np.where(np.eye(3, 4) == 1, np.nan, good), good)
