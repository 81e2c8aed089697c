"""Rejects found again by their own name where an input was made anew, and the sums of a set that is being mended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_corpus import png, sample_members, write_folder, write_tar

from pipeline import retry
from pipeline.config import ImageFolderConfig, ParquetConfig, S3Config, SourceConfig, WebDatasetConfig
from pipeline.ledger import LedgerRecord, Retried
from pipeline.rejects import RULE_STAGE, Counts, Reject, write_rejects
from pipeline.retry import (
    Pick,
    PlannedRetry,
    RetryDetails,
    RetrySource,
    append_units,
    names_in_plan,
    plan_retries,
    with_retries,
    write_planned,
)
from pipeline.sources.plan import KeyFormat, Plan, WorkUnit
from pipeline.sources.registry import make_source
from pipeline.sources.sample import InputSample
from pipeline.storage import open_storage
from pipeline.tally import Tally


def retried(tar: Path, *picks: Pick) -> list[tuple[int, str, bytes, str | None]]:
    """Position, name, bytes and problem of what an appended unit reads of a tar."""
    source = make_source(WebDatasetConfig(kind="webdataset", urls=(str(tar),)), s3=S3Config())
    planned = PlannedRetry(unit_index=1, keys=["0"] * len(picks), rejected_by_reason={}, max_image_pixels=1000)
    details = RetryDetails(planned=planned, picks=((source.plan().units[0], picks),))
    unit = WorkUnit(unit_index=1, name="rejects", fingerprint="", mark="", details=details)
    return [
        (sample.position, sample.source, sample.data, None if sample.problem is None else sample.problem.reason)
        for sample in RetrySource(source).read(unit)
    ]


def tar_of(path: Path, *numbers: int) -> Path:
    return write_tar(path / "a.tar", [member for number in numbers for member in sample_members(number)])


def test_rejects_of_an_unchanged_input_are_read_at_their_places(tmp_path: Path) -> None:
    tar = tar_of(tmp_path, 0, 1, 2, 3)
    expected = [(0, "s0001", png(1), None), (1, "s0003", png(3), None)]
    assert retried(tar, Pick(1, "s0001"), Pick(3, "s0003")) == expected
    assert retried(tar, Pick(1, None), Pick(3, None)) == expected  # planned before names were kept


def test_rejects_that_have_moved_are_found_by_name_and_none_in_their_place(tmp_path: Path) -> None:
    tar = tar_of(tmp_path, 9, 3, 0, 1, 2)  # a sample more, and one that came later is early
    found = retried(tar, Pick(1, "s0001"), Pick(3, "s0003"), Pick(4, "s0004"))
    assert found == [(0, "s0001", png(1), None), (1, "s0003", png(3), None), (2, "s0004", b"", "gone")]


def test_of_several_of_one_name_the_one_in_its_place_is_taken(tmp_path: Path) -> None:
    class Twice:
        """A source whose names repeat, as those of tables may."""

        def __init__(self) -> None:
            self.plain = make_source(WebDatasetConfig(kind="webdataset", urls=(str(tar),)), s3=S3Config())

        def plan(self) -> Plan:
            return self.plain.plan()

        def read(self, unit: WorkUnit) -> Iterator[InputSample]:
            return (replace(sample, source="same") for sample in self.plain.read(unit))

    tar = tar_of(tmp_path, 0, 1, 2, 3)
    source = Twice()
    planned = PlannedRetry(unit_index=1, keys=["0", "1", "2"], rejected_by_reason={}, max_image_pixels=1000)
    picks = (Pick(0, "gone"), Pick(1, "same"), Pick(3, "same"))
    details = RetryDetails(planned=planned, picks=((source.plan().units[0], picks),))
    unit = WorkUnit(unit_index=1, name="rejects", fingerprint="", mark="", details=details)
    assert [sample.data for sample in RetrySource(source).read(unit)] == [b"", png(1), png(3)]


def test_appended_units_go_on_where_their_numbers_get_a_digit_more(tmp_path: Path) -> None:
    units = tuple(
        WorkUnit(unit_index=index, name=f"{index}", fingerprint="", mark="", details=None) for index in range(99)
    )
    keys = KeyFormat(unit_digits=2, position_digits=1)
    storage = open_storage(str(tmp_path))
    for index in (99, 100, 101):
        planned = PlannedRetry(unit_index=index, keys=["000"], rejected_by_reason={}, max_image_pixels=1)
        storage.write_json(f"retries/{keys.stem(index)}.json", planned.model_dump(mode="json"))
    plan = with_retries(storage, Plan(units=units, keys=keys, class_names=None))
    assert [unit.unit_index for unit in plan.units[99:]] == [99, 100, 101]


@pytest.mark.parametrize("kind", ["image_folder", "parquet"])
def test_the_plan_of_a_folder_or_a_table_tells_the_names_that_reading_gives(tmp_path: Path, kind: str) -> None:
    tree = write_folder(tmp_path / "tree", images_per_class=2)
    (tree / "bear" / "1.png").rename(tree / "bear" / os.fsdecode(b"caf\xe9 1.png"))
    pq.write_table(pa.table({"image": [png(0), None, png(2), b"", png(4)]}), tmp_path / "a.parquet", row_group_size=2)
    config: SourceConfig = ImageFolderConfig(kind="image_folder", root=str(tree), samples_per_unit=4)
    expected = [{"apple/0.png", "apple/1.png", "bear/0.png", "bear/caf\\xe9 1.png"}, {"car/0.png", "car/1.png"}]
    if kind == "parquet":
        config = ParquetConfig(kind="parquet", urls=(str(tmp_path / "a.parquet"),))
        expected = [{"a.parquet#0", "a.parquet#1"}, {"a.parquet#2", "a.parquet#3"}, {"a.parquet#4"}]
    source = make_source(config, s3=S3Config())
    units = source.plan().units
    assert [names_in_plan(unit) for unit in units] == expected
    assert [{sample.source for sample in source.read(unit)} for unit in units] == expected


def test_the_plan_of_a_tar_tells_no_names(tmp_path: Path) -> None:
    source = make_source(WebDatasetConfig(kind="webdataset", urls=(str(tar_of(tmp_path, 0)),)), s3=S3Config())
    assert names_in_plan(source.plan().units[0]) is None


def reject_of(key: str, *, stage: str = "decode") -> Reject:
    return Reject(key=key, source=f"s{key}", stage=stage, reason="empty", detail="")


@pytest.mark.parametrize(
    ("max_inputs", "groups"), [(9, [["20", "25", "97"], ["101", "104"]]), (1, [["20", "25"], ["97"], ["101", "104"]])]
)
def test_rejects_of_all_units_are_planned_in_the_order_of_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_inputs: int, groups: list[list[str]]
) -> None:
    monkeypatch.setattr(retry, "MAX_SAMPLES_PER_UNIT", 3)
    monkeypatch.setattr(retry, "MAX_INPUTS_PER_UNIT", max_inputs)
    units = tuple(WorkUnit(unit_index=i, name=f"{i}", fingerprint="", mark="", details=None) for i in range(11))
    plan = Plan(units=units, keys=KeyFormat(unit_digits=1, position_digits=1), class_names=None)
    storage = open_storage(str(tmp_path))

    write_rejects(storage, "rejects/10.parquet", [reject_of("101"), reject_of("104")])
    write_rejects(storage, "rejects/2.parquet", [reject_of("20"), reject_of("25")])
    write_rejects(storage, "rejects/3.parquet", [reject_of("30", stage=RULE_STAGE)])
    write_rejects(storage, "rejects/9.parquet", [reject_of("97")])
    planned = plan_retries(storage, plan, max_image_pixels=5)
    assert storage.list("retries/") == {}
    write_planned(storage, planned, keys=plan.keys)
    assert append_units(plan, planned) == with_retries(storage, plan)
    appended = [unit.details.planned for unit in with_retries(storage, plan).units[11:]]
    assert [one.keys for one in appended] == groups
    assert [one.sources for one in appended] == [[f"s{key}" for key in group] for group in groups]
    assert [one.rejected_by_reason for one in appended] == [{"decode/empty": len(group)} for group in groups]


def test_rejects_of_a_retry_are_planned_again_at_their_places_in_the_input(tmp_path: Path) -> None:
    units = tuple(WorkUnit(unit_index=i, name=f"{i}", fingerprint="", mark="", details=None) for i in range(11))
    plan = Plan(units=units, keys=KeyFormat(unit_digits=1, position_digits=1), class_names=None)
    storage = open_storage(str(tmp_path))
    write_rejects(storage, "rejects/10.parquet", [reject_of("101"), reject_of("104")])
    write_rejects(storage, "rejects/2.parquet", [reject_of("20"), reject_of("25")])
    plan = append_units(plan, plan_retries(storage, plan, max_image_pixels=5))
    write_rejects(storage, "rejects/11.parquet", [reject_of("110"), reject_of("112")])  # 20 and 101
    (again,) = plan_retries(storage, plan, max_image_pixels=5)
    last = append_units(plan, [again]).units[12]
    assert last.details.planned.keys == ["110", "112"]
    assert [(unit.unit_index, picks) for unit, picks in last.details.picks] == [
        (2, (Pick(0, "s110"),)),
        (10, (Pick(1, "s112"),)),
    ]


def record(unit_index: int, counts: Counts, *, retried: Retried | None = None) -> LedgerRecord:
    return LedgerRecord(
        unit_index=unit_index,
        unit="",
        unit_fingerprint="",
        input_mark="",
        input_sha256="",
        fingerprint_digest="",
        counts=counts,
        shard=None,
        shard_mark="",
        seconds_of_stage={},
        retried=retried,
    )


def test_a_set_whose_retried_unit_is_done_again_adds_up_before_and_after() -> None:
    torn = {"decode/truncated": 1}
    first = Counts(
        num_read=10, num_written=9, num_dropped=0, num_rejected=1, dropped_by_reason={}, rejected_by_reason=torn
    )
    second = Counts(
        num_read=1, num_written=1, num_dropped=0, num_rejected=0, dropped_by_reason={}, rejected_by_reason={}
    )
    tally = Tally()
    tally.add(record(1, second, retried=Retried(keys=["00"], rejected_by_reason=torn, inputs={"0": ""})))
    assert (tally.totals().num_read, tally.totals().num_written, tally.totals().num_rejected) == (1, 1, 0)
    tally.add(record(0, first))
    assert (tally.totals().num_read, tally.totals().num_written, tally.totals().num_rejected) == (10, 10, 0)
