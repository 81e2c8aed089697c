"""Intervals against what statistics says of means, and against fresh draws of whole sets for the Frechet distance."""

import numpy as np
import pytest

from training.evaluation.bootstrap import Method, interval, intervals_by_group, resample
from training.evaluation.distances import frechet_distance


def test_resampling_is_a_function_of_its_counters() -> None:
    draws = {
        tuple(resample(20, method="replacement", seed=seed, draw_index=draw, set_index=position, group_index=group))
        for seed, draw, position, group in [(1, 0, 0, 0), (2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1)]
    }
    assert len(draws) == 5
    assert tuple(resample(20, method="replacement", seed=1, draw_index=0)) in draws


def test_halves_hold_each_position_at_most_once_and_all_equally_often() -> None:
    halves = [resample(11, method="halves", seed=3, draw_index=draw) for draw in range(2000)]
    assert {len(set(half.tolist())) for half in halves} == {5}
    counts = np.bincount(np.concatenate(halves), minlength=11)
    # Expected 2000 * 5 / 11 = 909, standard deviation 22.
    assert np.abs(counts - 909).max() < 90


def test_replacement_draws_each_position_equally_often() -> None:
    draws = np.concatenate([resample(10, method="replacement", seed=4, draw_index=draw) for draw in range(1000)])
    assert draws.min() == 0
    assert draws.max() == 9
    assert np.abs(np.bincount(draws) - 1000).max() < 150


@pytest.mark.parametrize("method", ["replacement", "halves"])
def test_interval_of_a_mean_is_1_96_standard_errors_wide(method) -> None:
    values = np.random.default_rng(0).normal(size=400) * 3 + 1
    found = interval(lambda i: values[i].mean(), [400], method=method, seed=5, num_draws=1000)
    assert found.value == pytest.approx(values.mean())
    error = values.std(ddof=1) / 20
    assert found.high - found.value == pytest.approx(1.96 * error, rel=0.15)
    assert found.value - found.low == pytest.approx(1.96 * error, rel=0.15)


@pytest.mark.parametrize(
    ("method", "level", "ends"), [("replacement", 0.95, [0.025, 0.975]), ("halves", 0.8, [0.1, 0.9])]
)
def test_the_ends_are_quantiles_of_the_draws_those_of_halves_about_the_value(
    method: Method, level: float, ends: list[float]
) -> None:
    values, seen = np.random.default_rng(1).exponential(size=30), []

    def statistic(positions: np.ndarray) -> float:
        seen.append(float(values[positions].max()))
        return seen[-1]

    found = interval(statistic, [30], method=method, seed=5, num_draws=40, level=level)
    value, *draws = seen
    moved = value - np.mean(draws) if method == "halves" else 0.0
    assert len(draws) == 40
    assert [found.low, found.high] == pytest.approx(np.quantile(draws, ends) + moved)
    assert found.value == value == values.max()


def fresh_sets(seed: int, *, dims: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, dims)), generator.normal(size=(count, dims)) * 1.2 + 0.3


def test_halves_give_the_frechet_distance_the_spread_that_fresh_sets_have() -> None:
    dims, count = 8, 100
    fresh = [frechet_distance(*fresh_sets(seed, dims=dims, count=count)) for seed in range(300)]
    spread = np.quantile(fresh, 0.975) - np.quantile(fresh, 0.025)
    widths = []
    for seed in range(10):
        a_NF, b_MF = fresh_sets(1000 + seed, dims=dims, count=count)
        found = interval(
            lambda i, j, a=a_NF, b=b_MF: frechet_distance(a[i], b[j]),
            [count, count],
            method="halves",
            seed=seed,
            num_draws=100,
        )
        assert found.low < found.value < found.high
        widths.append(found.high - found.low)
    assert np.mean(widths) == pytest.approx(spread, rel=0.25)


def test_replacement_leaves_the_frechet_distance_outside_its_own_interval() -> None:
    a_NF, b_MF = fresh_sets(7, dims=60, count=80)
    found = interval(
        lambda i, j: frechet_distance(a_NF[i], b_MF[j]), [80, 80], method="replacement", seed=1, num_draws=60
    )
    assert found.low > found.value


def test_sets_are_resampled_independently_of_each_other() -> None:
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def statistic(i: np.ndarray, j: np.ndarray) -> float:
        seen.append((i, j))
        return 0.0

    interval(statistic, [9, 9], method="replacement", seed=1, num_draws=2)
    assert seen[0][0].tolist() == seen[0][1].tolist() == list(range(9))
    assert seen[1][0].tolist() != seen[1][1].tolist()


def test_groups_have_their_own_samples_and_small_ones_are_left_out() -> None:
    values = np.array([1.0, 10, 1, 10, 1, 10, 1, 10, 5, 3])
    groups = ["a", "b", "a", "b", "a", "b", "a", "b", "c", "a"]
    found = intervals_by_group(lambda i: values[i].mean(), [groups], method="replacement", seed=1, num_draws=50)
    assert list(found) == ["a", "b"]
    assert found["a"].value == pytest.approx(7 / 5)
    assert found["a"].num_samples == (5,)
    assert found["a"].high > found["a"].value
    assert (found["b"].low, found["b"].value, found["b"].high) == (10, 10, 10)


def test_a_group_needs_samples_in_every_set() -> None:
    found = intervals_by_group(
        lambda i, j: float(len(i) + len(j)),
        [[0] * 4 + [1] * 4, [1] * 6 + [2] * 4],
        method="halves",
        seed=1,
        num_draws=2,
    )
    assert {group: of.num_samples for group, of in found.items()} == {1: (4, 6)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": [3]}, "at least 4 samples for halves, got \\(3,\\)"),
        ({"num_draws": 1}, "got 1, 0.95"),
        ({"level": 1.0}, "got 200, 1.0"),
    ],
)
def test_intervals_without_a_meaning_are_refused(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interval(lambda i: 0.0, **{"num_samples": [8], "method": "halves", "seed": 0, **settings})
