"""Differences to a study's baseline and their interval over seeds."""

import pytest
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from jobs.study_difference import difference, student_quantile


@pytest.mark.parametrize("degrees", [*range(1, 12), 30, 99, 998])
def test_the_quantile_is_students(degrees: int) -> None:
    assert student_quantile(degrees) == pytest.approx(student.ppf(0.975, degrees), rel=1e-9)


def test_the_interval_is_that_of_a_paired_test() -> None:
    pairs = [(3.188, 3.214), (3.190, 3.211), (3.183, 3.214)]
    found = difference(pairs)
    tested = ttest_1samp([ours - baseline for ours, baseline in pairs], 0.0)
    low, high = tested.confidence_interval(0.95)
    assert found is not None
    assert found.mean == pytest.approx((low + high) / 2)
    assert found.half_width == pytest.approx((high - low) / 2)
    assert found.num_pairs == 3
    assert found.is_clear == (tested.pvalue < 0.05)


@pytest.mark.parametrize(("gaps", "is_clear"), [([1.0, 1.1, 0.9], True), ([1.0, 0.1, -0.9], False)])
def test_a_difference_is_clear_where_the_interval_leaves_zero_out(gaps: list[float], is_clear: bool) -> None:
    found = difference([(gap, 0.0) for gap in gaps])
    assert found is not None
    assert found.is_clear == is_clear


def test_one_pair_has_a_difference_and_no_interval() -> None:
    found = difference([(2.0, 5.0)])
    assert found is not None
    assert (found.mean, found.half_width, found.num_pairs, found.is_clear) == (-3.0, None, 1, False)
    assert difference([]) is None
