"""An evaluate spec: what it refuses, with the line, and that a headline has what a table of many needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.evaluation_report import told
from jobs.spec import SpecError, load_spec, shipped_spec
from pipeline.config import TokenizeConfig
from training.evaluation.config import EvaluateConfig
from training.evaluation.headline import headline_of


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("features.network=vgg", "features.network must be one of efficientnet-lite0, inception-v3, got 'vgg'"),
        ("tuning={}", "tuning must name values of at least one of temperature, top_k, top_p, guidance"),
        ("tuning.top_p=[0.9, 1.5]", "tuning.top_p.1 must be at most 1"),
        (
            "features.cache_dir=s3://bucket/features",
            "features.cache_dir must be a local directory, got 's3://bucket/features'",
        ),
        ("reference.num_images=3", "reference.num_images must be at least 8, got 3"),
        ("held_out.num_sample=3", "held_out.num_sample is not a field; did you mean num_samples?"),
    ],
)
def test_what_is_wrong_with_a_spec_is_told_in_plain_words(override: str, problem: str) -> None:
    with pytest.raises(SpecError, match=problem.replace("?", r"\?")):
        load_spec(shipped_spec("evaluate_tensorar"), [override])


def test_the_shipped_spec_tunes_and_has_a_control() -> None:
    spec = load_spec(shipped_spec("evaluate_tensorar"))
    assert isinstance(spec, EvaluateConfig)
    assert spec.control is not None
    assert spec.tuning is not None
    assert len(spec.tuning.samplers(spec.sampler)) == 4
    assert spec.training_set is not None
    tokenize = load_spec(shipped_spec("tokenize_open_emoji"))
    assert isinstance(tokenize, TokenizeConfig)
    assert (spec.training_set.num_samples, spec.training_set.num_views) == (None, 2)
    assert tokenize.views.kind == "flip"  # two
    assert Path(spec.run_dir).parts[:2] == Path(spec.weights).parts[:2] == ("runs", "demo")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (193.17, "193"),
        (96.857, "96.9"),
        (3.4495, "3.45"),
        (0.17969, "0.180"),
        (-0.0312, "-0.0312"),
        (0.00041, "0.0004"),
        (0.0, "0.000"),
    ],
)
def test_numbers_are_told_with_three_digits(value: float, expected: str) -> None:
    assert told({"value": value, "low": value, "high": value}) == {
        "value": expected,
        "range": f"{expected} to {expected}",
    }


def test_every_headline_is_the_number_that_its_name_says() -> None:
    def interval(value: float) -> dict[str, Any]:
        return {"value": value, "low": value - 0.5, "high": value + 0.5, "num_samples": [9]}

    sets = ("samples", "decoded", "real")
    measures = ("frechet_distance", "frechet_distance_to_decoded", "kernel_distance", "kernel_distance_to_decoded")
    values = {
        name: {of: interval(10 * row + column) for column, of in enumerate(sets, 1)}
        for row, name in enumerate((*measures, "precision", "recall", "density", "coverage"), 1)
    }
    scores = {"label_score": {"top_1": {"samples": interval(91)}, "top_5": {"samples": interval(92)}}}
    kinds, differences = ("schedule", "own_drafts", "uninformed"), ("draft_shift", "gap")
    result = {
        "weights": {"window_size": 4},
        "held_out": {
            "offset_0": {kind: interval(100 + place) for place, kind in enumerate(kinds)},
            "differences": {name: interval(110 + place) for place, name in enumerate(differences)},
        },
        "measures": values | scores,
        "flips": {"flip_rate": 0.9},
        "memorised": {"samples": {"share": 0.01}, "decoded": {"share": 0.02}},
        "cost": {"backbone_calls_per_image": 64.0},
        "times": {"seconds_per_image": 0.5},
    }
    headline = headline_of(result)
    assert headline["gap"] == {"value": 111, "low": 110.5, "high": 111.5}
    assert {name: entry["value"] for name, entry in headline.items()} == {
        "loss_own_drafts": 101,
        "loss_schedule": 100,
        "draft_shift": 110,
        "gap": 111,
        "frechet_distance": 11,
        "frechet_distance_codes": 12,
        "frechet_distance_real": 13,
        "frechet_distance_to_decoded": 21,
        "kernel_distance": 31,
        "kernel_distance_to_decoded": 41,
        "precision": 51,
        "recall": 61,
        "label_score": 91,
        "flip_rate": 0.9,
        "repeated_share": 0.01,
        "backbone_calls_per_image": 64.0,
        "seconds_per_image": 0.5,
    }
