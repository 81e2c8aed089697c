"""Precision, recall, density, coverage and nearest images against loops over all pairs."""

import numpy as np
import pytest

from training.evaluation import neighbours
from training.evaluation.neighbours import (
    is_near_duplicate,
    manifold_scores,
    near_duplicate_threshold,
    nearest,
    nearest_other,
    neighbour_distances,
    num_near_duplicates,
)


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", 7)


def two_sets() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.normal(size=(40, 3)), generator.normal(size=(25, 3)) * 0.8 + 1.5


def radius(vectors: np.ndarray, position: int, *, k: int) -> float:
    distances = [np.linalg.norm(vectors[position] - other) for i, other in enumerate(vectors) if i != position]
    return float(sorted(distances)[k - 1])


@pytest.mark.parametrize("k", [1, 3])
def test_scores_are_those_of_all_pairs(k: int) -> None:
    real, generated = two_sets()
    inside = [[np.linalg.norm(g - r) <= radius(real, i, k=k) for i, r in enumerate(real)] for g in generated]
    reached = [any(np.linalg.norm(g - r) <= radius(generated, j, k=k) for j, g in enumerate(generated)) for r in real]
    scores = manifold_scores(real, generated, k=k)
    assert scores.precision == pytest.approx(np.mean([any(balls) for balls in inside]))
    assert scores.recall == pytest.approx(np.mean(reached))
    assert scores.density == pytest.approx(np.sum(inside) / (k * 25))
    assert scores.coverage == pytest.approx(np.mean(np.any(inside, axis=0)))
    assert 0 < scores.recall < 1
    assert 0 < scores.precision < 1


def test_few_modes_have_precision_without_recall_and_noise_the_reverse() -> None:
    generator = np.random.default_rng(1)
    real = generator.normal(size=(200, 2))
    one_mode = manifold_scores(real, generator.normal(size=(200, 2)) * 0.05)
    too_wide = manifold_scores(real, generator.normal(size=(200, 2)) * 20)
    assert one_mode.precision > 0.98
    assert one_mode.recall < 0.1
    assert too_wide.precision < 0.1
    assert too_wide.recall > 0.9


def test_equal_images_are_each_others_neighbours_but_none_is_its_own() -> None:
    features = np.array([[0.0, 1.0], [0.0, 1.0], [3.0, 1.0], [7.0, 1.0]])
    assert neighbour_distances(features, k=1) == pytest.approx([0, 0, 3, 4], abs=1e-6)
    assert neighbour_distances(features, k=2) == pytest.approx([3, 3, 3, 7])
    assert nearest_other(features).index_N.tolist() == [1, 0, 3, 2]


def test_distances_of_float32_features_are_computed_in_float64() -> None:
    features = (np.random.default_rng(3).normal(size=(20, 3)) + 50).astype(np.float32)
    expected = [radius(features.astype(np.float64), position, k=2) for position in range(20)]
    assert neighbour_distances(features, k=2) == pytest.approx(expected, rel=1e-7)


def test_nearest_is_that_of_all_pairs() -> None:
    samples, references = two_sets()
    cosines = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in references] for a in samples]
    found = nearest(samples.astype(np.float32), references.astype(np.float32))
    assert found.index_N.tolist() == np.argmax(cosines, axis=1).tolist()
    assert found.cosine_distance_N == pytest.approx(1 - np.max(cosines, axis=1), abs=1e-6)


def test_nearest_other_is_that_of_all_pairs_without_the_sample() -> None:
    references = two_sets()[1]
    cosines = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in references] for a in references])
    np.fill_diagonal(cosines, -2)
    found = nearest_other(references)
    assert found.index_N.tolist() == cosines.argmax(axis=1).tolist()
    assert found.cosine_distance_N == pytest.approx(1 - cosines.max(axis=1), abs=1e-9)


def test_repeated_training_images_are_counted() -> None:
    generator = np.random.default_rng(2)
    training = generator.normal(size=(100, 20))
    fresh = generator.normal(size=(30, 20))
    repeated = training[:5] + generator.normal(size=(5, 20)) * 0.01
    samples = np.concatenate([fresh, repeated, training[50:52] * 3])  # the same direction: the same image
    threshold = near_duplicate_threshold(training, quantile=0.01)
    assert num_near_duplicates(nearest(samples, training), threshold=threshold) == 7
    assert nearest(samples, training).index_N[30:].tolist() == [0, 1, 2, 3, 4, 50, 51]


def test_threshold_is_the_quantile_of_the_distances_to_the_nearest_other_image() -> None:
    angles = np.radians([0, 1, 10, 30, 60])
    references = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # Nearest other: 1, 1, 9, 20 and 30 degrees; the median is 9.
    assert near_duplicate_threshold(references, quantile=0.5) == pytest.approx(1 - np.cos(np.radians(9)))
    assert near_duplicate_threshold(references) == pytest.approx(1 - np.cos(np.radians(1)))  # one in a hundred


def test_an_exact_copy_counts_where_the_training_images_have_copies_themselves() -> None:
    training = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    threshold = near_duplicate_threshold(training, quantile=0.5)
    found = nearest(np.array([[2.0, 0.0], [1.0, 1.0]]), training)
    assert num_near_duplicates(found, threshold=threshold) == 1
    assert is_near_duplicate(found.cosine_distance_N, threshold=threshold).tolist() == [True, False]


def test_sets_without_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="more than k samples and k >= 1, got 3 and k = 3"):
        neighbour_distances(np.eye(3), k=3)
    with pytest.raises(ValueError, match=r"got \(3, 3\) and \(4, 4\)"):
        nearest(np.eye(3), np.eye(4))
    with pytest.raises(ValueError, match="at least 2 references, got 1"):
        nearest_other(np.eye(3)[:1])
    with pytest.raises(ValueError, match="finite and above 0"):
        nearest(np.zeros((1, 3)), np.eye(3))
