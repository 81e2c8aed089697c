"""Gathered records: a copy that counts only while the ledger's listing agrees; without it all is read one by one."""

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.gathered import Ledger
from pipeline.ledger import LedgerRecord, Retried, record_name, write_record
from pipeline.local_storage import LocalStorage
from pipeline.rejects import Counts
from pipeline.shards import ShardInfo
from pipeline.storage import ArtifactError, Storage
from pipeline.tally import Tally


def record_of(unit_index: int, *, num_rejected: int = 0, retried: Retried | None = None) -> LedgerRecord:
    counts = Counts(
        num_read=5,
        num_written=5 - num_rejected,
        num_dropped=0,
        num_rejected=num_rejected,
        dropped_by_reason={},
        rejected_by_reason={"decode/empty": num_rejected} if num_rejected else {},
    )
    return LedgerRecord(
        unit_index=unit_index,
        unit=f"{unit_index}.tar",
        unit_fingerprint="f",
        input_mark="m",
        input_sha256="s",
        fingerprint_digest="d",
        counts=counts,
        shard=None,
        shard_mark="",
        seconds_of_stage={},
        retried=retried,
    )


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A ledger of three records, gathered."""
    storage = LocalStorage(tmp_path)
    ledger = Ledger(storage)
    for unit_index in range(3):
        stem = f"{unit_index:05d}"
        ledger.note(stem, record_of(unit_index), mark=write_record(storage, stem, record_of(unit_index)).mark)
    ledger.gather()
    return storage


def read(storage: Storage) -> dict[str, LedgerRecord | ArtifactError]:
    return dict(Ledger(storage).records())


def test_gathered_records_are_read_without_opening_one_of_the_ledgers(storage: Storage, tmp_path: Path) -> None:
    times = {path: path.stat() for path in tmp_path.glob("ledger/*.json")}
    for path, status in times.items():  # same size, same time, other content: only the copy can tell the truth
        path.write_bytes(b"x" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert read(storage) == {f"{unit_index:05d}": record_of(unit_index) for unit_index in range(3)}


def test_a_record_that_was_written_again_or_removed_is_believed_over_its_copy(storage: Storage) -> None:
    write_record(storage, "00001", record_of(1, num_rejected=2))
    storage.remove(record_name("00002"))
    assert read(storage) == {"00000": record_of(0), "00001": record_of(1, num_rejected=2)}


def test_damaged_copies_are_told_and_the_ledger_is_read_instead(
    storage: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "ledger" / "gathered-000000.parquet").write_bytes(b"no parquet")
    with caplog.at_level(logging.WARNING):
        assert len(read(storage)) == 3
    assert "its records are read one by one" in caplog.text


def test_records_that_were_read_one_by_one_are_gathered_for_the_next_run(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "ledger" / "gathered-000000.parquet").unlink()
    ledger = Ledger(storage)
    assert len(dict(ledger.records())) == 3
    ledger.gather()
    assert [path.name for path in tmp_path.glob("ledger/gathered-*")] == ["gathered-000000.parquet"]
    assert len(read(storage)) == 3


def test_a_damaged_record_is_handed_over_as_its_problem(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "ledger" / "00001.json").write_text("{")
    problem = read(storage)["00001"]
    assert isinstance(problem, ArtifactError)
    assert "ledger/00001.json" in str(problem)


@pytest.mark.parametrize(
    ("number", "action"),
    [
        (errno.EACCES, "give the user of the job permission to read it"),
        (errno.EMFILE, "mend that and run the same command again"),
    ],
)
def test_a_record_that_cannot_be_read_just_now_is_not_taken_for_damaged(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, action: str
) -> None:
    (tmp_path / "ledger" / "gathered-000000.parquet").unlink()
    real_open = os.open

    def open_or_fail(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith("ledger/00001.json"):
            raise OSError(number, os.strerror(number), path)
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_or_fail)
    with pytest.raises(ArtifactError, match=rf"ledger/00001\.json: it must be readable, got .*; {action}"):
        read(storage)


def test_a_retried_reject_counts_once_where_it_ended() -> None:
    tally = Tally()
    tally.add(record_of(0, num_rejected=5))
    retried = Retried(keys=["a", "b", "c", "d", "e"], rejected_by_reason={"decode/empty": 5}, inputs={})
    tally.add(record_of(1, num_rejected=2, retried=retried))
    totals = tally.totals()
    assert (totals.num_read, totals.num_written, totals.num_rejected) == (5, 3, 2)
    assert totals.rejected_by_reason == {"decode/empty": 2}


def test_a_tally_adds_up_what_was_dropped_and_what_was_rejected_in_units_of_their_own() -> None:
    tally = Tally()
    dropped = Counts(
        num_read=4,
        num_written=1,
        num_dropped=3,
        num_rejected=0,
        dropped_by_reason={"min_side_px": 2, "max_aspect_ratio": 1},
        rejected_by_reason={},
    )
    tally.add(record_of(2))
    tally.add(record_of(0).model_copy(update={"counts": dropped}))
    tally.add(record_of(1, num_rejected=2))
    for _ in range(2):  # asking changes nothing
        assert tally.totals() == Counts(
            num_read=14,
            num_written=9,
            num_dropped=3,
            num_rejected=2,
            dropped_by_reason={"max_aspect_ratio": 1, "min_side_px": 2},
            rejected_by_reason={"decode/empty": 2},
        )
    assert (tally.num_units, 1 in tally, 3 in tally) == (3, True, False)


def test_shards_stand_in_the_order_of_their_units_whatever_order_they_came_in() -> None:
    tally = Tally()
    shards = [ShardInfo(name=f"{unit}.tar", num_samples=5, bytes=1, sha256="s") for unit in range(4)]
    for unit in (2, 0, 3):
        tally.add(record_of(unit).model_copy(update={"shard": shards[unit]}))
    tally.add(record_of(1))  # has none
    assert tally.shards_in_order() == [shards[0], shards[2], shards[3]]
