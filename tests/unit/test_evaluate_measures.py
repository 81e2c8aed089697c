"""Which sets the measures of an evaluation are taken of, on features whose distances are known without computing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from training.evaluation.config import BootstrapConfig
from training.evaluation.distances import kernel_distance
from training.evaluation.image_features import Half, Reference
from training.evaluation.intervals import Intervals
from training.evaluation.measures import (
    caption_score,
    compared_sets,
    distance_of_class,
    distances_of,
    distances_to_decoded,
    label_score,
    manifold_of,
)
from training.evaluation.samples import SampleSet

INTERVALS = Intervals(BootstrapConfig(num_resamples=2, min_per_class=4), seed=0)
POINTS = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)


def half(
    real_NF: np.ndarray, decoded_NF: np.ndarray, *, labels_N: np.ndarray | None = None, captions: tuple[str, ...] = ()
) -> Half:
    labels_N = np.zeros(len(real_NF), dtype=np.int64) if labels_N is None else labels_N
    captions_N = np.array(captions or [""] * len(real_NF), dtype=np.str_)
    return Half(labels_N=labels_N, captions_N=captions_N, real_NF=real_NF, decoded_NF=decoded_NF)


def sample_set(features_NF: np.ndarray, *, labels_N: np.ndarray | None = None) -> SampleSet:
    count = len(features_NF)
    return SampleSet(
        labels_N=np.zeros(count, dtype=np.int64) if labels_N is None else labels_N,
        codes_NT=np.zeros((count, 1), dtype=np.int32),
        drafts_NTK=np.zeros((count, 1, 1), dtype=np.int32),
        features_NF=features_NF,
        calls_per_image=1.0,
        seconds_per_image=1.0,
    )


def moved(by: float) -> np.ndarray:
    return POINTS + np.array([by, 0, 0], dtype=np.float32)


def values_of(intervals: dict[str, Any]) -> dict[str, float]:
    return {of: interval["value"] for of, interval in intervals.items()}


def test_distances_are_to_the_report_half_as_it_is_and_decoded() -> None:
    # Sets that are moved copies of each other are as far apart as the square of the way.
    reference = Reference(tuning=half(moved(1), moved(5)), report=half(moved(0), moved(3)), num_rejected=0)
    sets = compared_sets(sample_set(moved(7)), reference)
    to_real = distances_of("frechet_distance", sets, reference=reference, intervals=INTERVALS)
    assert values_of(to_real) == pytest.approx({"samples": 49, "real": 1, "decoded": 25}, rel=1e-4)
    to_decoded = distances_to_decoded("frechet_distance", sets, reference=reference, intervals=INTERVALS)
    assert values_of(to_decoded) == pytest.approx({"samples": 16, "decoded": 4}, rel=1e-4)


def test_as_many_samples_as_the_tuning_half_has_are_taken_evenly_over_the_classes() -> None:
    numbers = np.arange(7, dtype=np.float32)[:, None]
    reference = Reference(tuning=half(numbers[:4], -numbers[:4]), report=half(numbers, numbers), num_rejected=0)
    sets = compared_sets(sample_set(numbers), reference)  # sorted by their labels, so the first four lack the last ones
    assert {of: features_NF[:, 0].tolist() for of, features_NF in sets.items()} == {
        "samples": [0, 1, 3, 5],
        "real": [0, 1, 2, 3],
        "decoded": [0, -1, -2, -3],
    }
    few = compared_sets(sample_set(numbers[:3]), reference)
    assert {of: len(features_NF) for of, features_NF in few.items()} == {"samples": 3, "real": 3, "decoded": 3}


def test_intervals_have_the_draws_and_the_seed_of_the_spec() -> None:
    sizes: list[tuple[int, int]] = []

    def distance(a_NF: np.ndarray, b_MF: np.ndarray) -> float:
        sizes.append((len(a_NF), len(b_MF)))
        return float(a_NF.sum() - b_MF.sum())

    def ends(seed: int) -> list[float]:
        intervals = Intervals(BootstrapConfig(num_resamples=5, min_per_class=4), seed=seed)
        labels_N = np.array([0, 1] * 6)
        found = [
            intervals.of_mean(POINTS[:, 0]),
            intervals.of_mean_by_class(POINTS[:, 0], labels_N)["0"],
            intervals.of_distance(distance, POINTS, POINTS[:9]),
            intervals.of_distance_by_class(distance, POINTS, POINTS, labels_N=labels_N, labels_M=labels_N)["0"],
        ]
        return [one["low"] for one in found if one is not None]

    first = ends(1)
    assert sizes[:6] == [(12, 9)] + [(6, 4)] * 5  # the whole sets, and halves without repeats
    assert sizes[6:12] == [(6, 6)] + [(3, 3)] * 5
    assert first == ends(1)
    assert all(one != other for one, other in zip(first, ends(2), strict=True))


def test_precision_is_of_samples_and_recall_of_real_images() -> None:
    line = np.arange(12, dtype=np.float32)[:, None]
    close = (0.5 + 0.001 * line).astype(np.float32)  # in the balls of the real images at 0, 1 and 2; their own are tiny
    reference = Reference(tuning=half(line + 100, line), report=half(line, line), num_rejected=0)
    found = manifold_of(compared_sets(sample_set(close), reference), reference=reference, intervals=INTERVALS)
    of_samples = {name: found[name]["samples"]["value"] for name in found}
    assert of_samples == {"precision": 1.0, "recall": 0.0, "density": 1.0, "coverage": 0.25}
    assert [found[name]["real"]["value"] for name in ("precision", "recall")] == [0.0, 0.0]
    assert [found[name]["decoded"]["value"] for name in ("precision", "recall")] == [1.0, 1.0]


def test_classes_of_the_label_score_are_those_of_both_halves() -> None:
    east, north = (np.tile(np.float32([x, y]), (4, 1)) for x, y in ((1, 0), (0, 1)))
    labels_N = np.full(4, 1, dtype=np.int64)
    reference = Reference(tuning=half(east, east), report=half(north, north, labels_N=labels_N), num_rejected=0)
    samples = sample_set(np.concatenate([east, north]), labels_N=np.array([0, 0, 0, 1, 1, 1, 1, 1]))
    score = label_score(samples, reference, num_classes=3, intervals=INTERVALS)
    assert values_of(score["top_1"]) == {"samples": 7 / 8, "real": 1.0}


def test_the_distance_of_a_class_is_that_of_its_own_images() -> None:
    labels_N = np.array([0] * 5 + [1] * 5 + [2] * 2)  # the last class has too few
    reference = Reference(
        tuning=half(moved(1), moved(2)), report=half(moved(0), moved(0), labels_N=labels_N), num_rejected=0
    )
    turned = labels_N[::-1].copy()
    found = distance_of_class(moved(3), turned, reference=reference, intervals=INTERVALS)
    assert values_of(found) == pytest.approx(
        {
            "0": kernel_distance(moved(3)[turned == 0], moved(0)[:5]),
            "1": kernel_distance(moved(3)[turned == 1], moved(0)[5:10]),
        }
    )


def test_images_without_a_label_are_no_class_of_their_own() -> None:
    labels_N = np.array([-1] * 6 + [2] * 6)
    reference = Reference(
        tuning=half(moved(1), moved(2)), report=half(moved(0), moved(0), labels_N=labels_N), num_rejected=0
    )
    found = distance_of_class(moved(3), labels_N, reference=reference, intervals=INTERVALS)
    assert values_of(found) == pytest.approx({"2": kernel_distance(moved(3)[6:], moved(0)[6:])})


def test_caption_score_is_of_decoded_images_by_a_map_of_those_that_have_captions() -> None:
    ways = {"to the east": [1, 0], "to the north": [0, 1], "east": [2, 0.1], "north": [0.1, 2]}
    east, north = (np.tile(np.float32([x, y]), (4, 1)) for x, y in ((1, 0), (0, 1)))
    decoded_NF = np.concatenate([east, north, 50 * (east - north)])  # the last four have no captions and no say
    captions = ("east",) * 4 + ("north",) * 4 + ("",) * 4
    report = half(north, east, labels_N=np.array([0, 0, 0, -1]))
    reference = Reference(tuning=half(-decoded_NF, decoded_NF, captions=captions), report=report, num_rejected=0)
    score = caption_score(
        sample_set(np.concatenate([east, north]), labels_N=np.array([0, 0, 0, 1, 1, 1, 1, 1])),
        reference,
        embed=lambda texts: np.float32([ways[text] for text in texts]),
        class_captions=("to the east", "to the north"),
        penalty=0.1,
        intervals=INTERVALS,
    )
    assert score["num_captions"] == 2
    assert values_of(score["top_1"]) == {"samples": 7 / 8, "decoded": 1.0}
    assert values_of(score["top_5"]) == {"samples": 1.0, "decoded": 1.0}
    assert values_of(score["top_1_of_class"]["samples"]) == {"1": 4 / 5}  # the other has too few samples
