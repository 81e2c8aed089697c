"""Samples that belong together: how they are found in a shard set, and what they do to an interval of a mean."""

from __future__ import annotations

import numpy as np
import pytest
from toy_corpus import sample_members, tokenize_config, tokenize_here, write_tar, write_tiny_tokenizer

from pipeline.shard_set import ShardSet
from pipeline.storage import ArtifactError
from training.evaluation.config import BootstrapConfig, HeldOutConfig
from training.evaluation.grouping import group_in, held_out_groups
from training.evaluation.intervals import Intervals

INTERVALS = Intervals(BootstrapConfig(num_resamples=200), seed=3)


def test_copies_of_a_sample_tell_no_more_than_one_of_them() -> None:
    values = np.random.default_rng(0).normal(size=50)
    copies, groups = np.repeat(values, 4), np.repeat(np.arange(50), 4)
    single, grouped, blind = (
        INTERVALS.of_mean(values),
        INTERVALS.of_mean(copies, groups_N=groups),
        INTERVALS.of_mean(copies),
    )
    assert single is not None
    assert grouped is not None
    assert blind is not None
    assert [grouped[end] for end in ("value", "low", "high")] == pytest.approx(
        [single[end] for end in ("value", "low", "high")]
    )
    assert (grouped["num_samples"], grouped["num_groups"]) == ([200], 50)
    width = grouped["high"] - grouped["low"]
    assert blind["high"] - blind["low"] == pytest.approx(width / 2, rel=0.2)  # as of four times as many samples


def test_a_large_group_counts_for_its_samples() -> None:
    found = INTERVALS.of_mean(np.array([0.0, 0.0, 0.0, 1.0]), groups_N=np.array([0, 0, 0, 1]))
    assert found is not None
    assert (found["value"], found["low"], found["high"]) == (0.25, 0.0, 1.0)  # of the four draws of two groups


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    root = tmp_path_factory.mktemp("toys")
    members = [member for number in range(6) for member in sample_members(number, concept=f"toy{number // 2}-{number}")]
    write_tar(root / "toys.tar", members)
    source = {"kind": "webdataset", "urls": [f"{root}/toys.tar"]}
    job = tokenize_config(root / "codes", source=source, weights=write_tiny_tokenizer(root / "tiny.safetensors"))
    tokenize_here(job)
    return ShardSet.open(job.run_dir)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, None),
        ({"group_field": "concept"}, [5, 0, 3]),
        ({"group_field": "concept", "group_separator": "-"}, [2, 0, 1]),
    ],
)
def test_groups_come_from_a_field_of_the_source(
    shard_set: ShardSet, fields: dict[str, str], wanted: list[int] | None
) -> None:
    config = HeldOutConfig.model_validate({"shards": "unused"} | fields)
    groups = held_out_groups(config, shard_set, sample_indices=np.array([5, 0, 3]))
    if wanted is None:
        assert groups is None
    else:
        assert groups is not None
        ranks = np.unique(wanted, return_inverse=True)[1]
        assert groups.tolist() == ranks.tolist()


def test_a_field_that_is_not_there_is_told_with_the_sample(shard_set: ShardSet) -> None:
    config = HeldOutConfig(shards="unused", group_field="hexcode")
    with pytest.raises(
        ArtifactError, match=r"held_out\.group_field, sample .*: group_field must be .* only concept, group"
    ):
        held_out_groups(config, shard_set, sample_indices=np.array([1]))


def test_one_group_of_all_samples_is_refused_as_its_interval_would_be_a_point(shard_set: ShardSet) -> None:
    config = HeldOutConfig(shards="unused", group_field="group")
    rule = r"held_out\.group_field must tell 2 or more groups of samples apart, got 'toys' for all 3; name another"
    with pytest.raises(ArtifactError, match=rule):
        held_out_groups(config, shard_set, sample_indices=np.array([5, 0, 3]))


def test_a_null_field_is_no_group_of_all_that_have_none() -> None:
    with pytest.raises(ArtifactError, match=r"of sample x: group_field must be .* got 'concept', but it is null there"):
        group_in({"concept": None, "group": "a"}, "concept", of="of sample x")


def test_a_separator_needs_a_field() -> None:
    with pytest.raises(ValueError, match="group_separator must come with group_field"):
        HeldOutConfig(shards="unused", group_separator="-")
