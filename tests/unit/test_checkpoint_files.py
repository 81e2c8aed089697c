"""Checkpoint directories: whole or not, found by verifying, damaged ones named and passed over."""

import errno
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disk_calls import record_disk_calls
from synthetic_checkpoints import FILES, flip_a_bit, prepare, record_of, remove, truncate, write_checkpoint

from pipeline.ledger import Manifest
from pipeline.local_storage import LocalStorage
from pipeline.shards import ShardInfo
from pipeline.storage import ArtifactError, Storage, StorageUnavailableError
from training.checkpoint import (
    SetRecord,
    checkpoint_name,
    commit_checkpoint,
    list_checkpoints,
    newest_record,
    newest_whole_checkpoint,
    prepared_name,
    read_record,
    remove_old_checkpoints,
    remove_partial,
    set_record,
    verify_checkpoint,
)
from training.config import CheckpointConfig


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path)


def path_of(storage: Storage, step: int) -> Path:
    return Path(storage.url_of(checkpoint_name(step)))


def test_committed_checkpoint_is_whole_and_newest_last(storage: Storage) -> None:
    for step in (8, 100, 20):
        write_checkpoint(storage, step)
    assert list_checkpoints(storage) == [8, 20, 100]
    newest = newest_whole_checkpoint(storage)
    assert newest is not None
    assert verify_checkpoint(storage, 100) == []
    state = {"step": 100, "samples_consumed": 1600, "num_skipped_steps": 1, "num_replaced_samples": 0}
    assert newest.state.model_dump() == state
    names = sorted(path.name for path in path_of(storage, 100).iterdir())
    assert names == ["rank_00000.safetensors", "rank_00001.safetensors", "record.json"]


def test_a_set_is_remembered_by_the_counts_and_hashes_of_its_shards() -> None:
    shards = [ShardInfo(name=f"{unit}.tar", num_samples=unit + 3, bytes=1, sha256=f"{unit}" * 64) for unit in range(2)]
    manifest = Manifest.model_construct(num_samples=7, shards=shards)
    expected = hashlib.sha256(b"3 " + b"0" * 64 + b"\n4 " + b"1" * 64 + b"\n").hexdigest()
    assert set_record(manifest) == SetRecord(num_samples=7, num_shards=2, sha256=expected)


def test_steps_beyond_eight_digits_are_steps(storage: Storage) -> None:
    for step in (99_999_999, 123_456_789):
        write_checkpoint(storage, step)
    assert list_checkpoints(storage) == [99_999_999, 123_456_789]


def test_other_names_and_files_are_no_checkpoints(storage: Storage) -> None:
    write_checkpoint(storage, 8)
    for name in ("step_00000016.old/record.json", "old_step_00000016/record.json", "step_00000024", "step_16/x"):
        storage.write_bytes(f"checkpoints/{name}", b"{}")
    assert list_checkpoints(storage) == [8]


def test_checkpoints_are_found_by_their_directories_and_not_by_the_files_of_every_rank(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (8, 16):
        write_checkpoint(storage, step)
    scanned: list[str] = []
    scandir = os.scandir

    def watched_scandir(path: Path) -> Any:
        scanned.append(Path(path).name)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", watched_scandir)
    assert list_checkpoints(storage) == [8, 16]
    assert scanned == ["checkpoints"]


def test_run_without_checkpoints_has_no_newest(storage: Storage) -> None:
    assert newest_whole_checkpoint(storage) is None
    prepare(storage, 5)
    assert newest_whole_checkpoint(storage) is None


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove])
@pytest.mark.parametrize("name", [*FILES, "record.json"])
def test_damaged_newest_is_passed_over_and_named(
    storage: Storage, name: str, damage: Callable[[Storage, str], None], caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(storage, 8)
    write_checkpoint(storage, 16)
    damage(storage, f"{checkpoint_name(16)}/{name}")
    with caplog.at_level(logging.WARNING):
        newest = newest_whole_checkpoint(storage)
    assert newest is not None
    assert newest.step == 8
    assert "step_00000016" in caplog.text
    assert name in caplog.text


def test_all_damaged_is_an_error_and_never_a_start_from_zero(storage: Storage) -> None:
    for step in (8, 16):
        write_checkpoint(storage, step)
        truncate(storage, f"{checkpoint_name(step)}/rank_00001.safetensors")
    with pytest.raises(
        ArtifactError, match=r"got 2 damaged ones \(of the oldest: step_00000008/rank_00001.safetensors"
    ):
        newest_whole_checkpoint(storage)


@pytest.mark.parametrize(
    ("name", "number", "error"),
    [
        ("record.json", errno.ESTALE, StorageUnavailableError),
        ("record.json", errno.EACCES, PermissionError),
        ("rank_00001.safetensors", errno.ESTALE, StorageUnavailableError),
        ("rank_00001.safetensors", errno.EACCES, PermissionError),
    ],
)
def test_a_checkpoint_that_cannot_be_read_just_now_is_not_passed_over(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, name: str, number: int, error: type[Exception]
) -> None:
    for step in (8, 16):
        write_checkpoint(storage, step)
    fail_on(monkeypatch, f"step_00000016/{name}", number)
    with pytest.raises(error, match=os.strerror(number)):
        newest_whole_checkpoint(storage)
    monkeypatch.undo()
    newest = newest_whole_checkpoint(storage)
    assert newest is not None
    assert newest.step == 16


def test_a_record_that_cannot_be_read_just_now_is_not_passed_over(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (8, 16):
        write_checkpoint(storage, step)
    fail_on(monkeypatch, "step_00000016/record.json", errno.ENOTCONN)
    with pytest.raises(StorageUnavailableError, match=r"check the disk or the mount"):
        newest_record(storage)


def test_a_file_with_a_bad_sector_is_damage(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (8, 16):
        write_checkpoint(storage, step)
    fail_on(monkeypatch, "step_00000016/rank_00001.safetensors", errno.EIO)
    newest = newest_whole_checkpoint(storage)
    assert newest is not None
    assert newest.step == 8


def fail_on(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Make the kernel answer opens of one file with an error, whether Python or C asks."""
    for module, function in ((os, "open"), (io, "open")):
        real_open = getattr(module, function)

        def open_or_fail(path: Any, *args: Any, real_open: Any = real_open, **kwargs: Any) -> Any:
            if str(path).endswith(name):
                raise OSError(number, os.strerror(number), path)
            return real_open(path, *args, **kwargs)

        monkeypatch.setattr(module, function, open_or_fail)


def test_the_newest_record_that_can_be_read_is_found(storage: Storage) -> None:
    assert newest_record(storage) is None
    for step in (4, 8):
        write_checkpoint(storage, step)
    storage.write_bytes("checkpoints/step_00000008/record.json", b"{")
    record = newest_record(storage)
    assert record is not None
    assert record.step == 4
    storage.write_bytes("checkpoints/step_00000004/record.json", b"{")
    with pytest.raises(ArtifactError, match=r"step_00000004: record\.json is damaged"):
        newest_record(storage)


def test_a_record_without_the_fields_added_since_is_read_as_before(storage: Storage) -> None:
    write_checkpoint(storage, 4)
    values = json.loads(storage.read_bytes("checkpoints/step_00000004/record.json"))
    before = values["record_sha256"]
    assert (values.pop("training_sets"), values.pop("num_replaced_samples")) == ([], 0)
    storage.write_json("checkpoints/step_00000004/record.json", values)
    assert read_record(storage, 4).record_sha256 == before


def test_a_record_that_was_changed_is_refused(storage: Storage) -> None:
    write_checkpoint(storage, 4)
    values = json.loads(storage.read_bytes("checkpoints/step_00000004/record.json"))
    values["samples_consumed"] += 16
    storage.write_json("checkpoints/step_00000004/record.json", values)
    with pytest.raises(ArtifactError, match=r"step_00000004: record\.json does not match its own sha256; use another"):
        read_record(storage, 4)


def test_renamed_checkpoint_is_not_whole(storage: Storage) -> None:
    write_checkpoint(storage, 8)
    path_of(storage, 8).rename(path_of(storage, 9))
    assert verify_checkpoint(storage, 9) == ["checkpoints/step_00000009: record.json is of step 8"]


def test_ranks_that_verify_together_find_each_file_once(storage: Storage) -> None:
    write_checkpoint(storage, 8)
    for name in FILES:
        truncate(storage, f"{checkpoint_name(8)}/{name}")
    found = [verify_checkpoint(storage, 8, rank=rank, world_size=2) for rank in (0, 1)]
    assert [[problem.split()[0] for problem in part] for part in found] == [
        ["step_00000008/rank_00000.safetensors"],
        ["step_00000008/rank_00001.safetensors"],
    ]


def test_a_checkpoint_of_the_first_version_is_named_with_the_way_out(storage: Storage) -> None:
    write_checkpoint(storage, 8)
    path = path_of(storage, 8) / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 1}))
    with pytest.raises(ArtifactError, match=r"version in record.json must be 2, got 1; go on with the tensorar that"):
        read_record(storage, 8)
    with pytest.raises(ArtifactError, match=r"got 1 damaged ones .*version in record\.json must be 2, got 1"):
        newest_whole_checkpoint(storage)


@pytest.mark.parametrize("damage", [truncate, remove])
def test_commit_refuses_a_file_that_did_not_arrive_whole(
    storage: Storage, damage: Callable[[Storage, str], None]
) -> None:
    prepare(storage, 8)
    damage(storage, f"{prepared_name(storage, 8)}/rank_00001.safetensors")
    with pytest.raises(ArtifactError, match=r"rank_00001\.safetensors must be there with 2101 bytes"):
        commit_checkpoint(storage, record_of(8))
    assert list_checkpoints(storage) == []


def test_commit_replaces_a_damaged_one_of_the_same_step(storage: Storage) -> None:
    write_checkpoint(storage, 8)
    truncate(storage, f"{checkpoint_name(8)}/rank_00000.safetensors")
    write_checkpoint(storage, 8)
    assert verify_checkpoint(storage, 8) == []


def test_leftovers_of_a_killed_save_are_removed_and_nothing_else(storage: Storage) -> None:
    write_checkpoint(storage, 8)
    prepare(storage, 16)
    remove_partial(storage)
    assert [path.name for path in path_of(storage, 8).parent.iterdir()] == ["step_00000008"]


def test_a_removal_that_was_killed_leaves_nothing_that_looks_like_a_checkpoint(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (8, 16):
        write_checkpoint(storage, step)

    def killed(path: Path) -> None:
        next(Path(path).iterdir()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_old_checkpoints(storage, keep_latest=1, keep_every_n_steps=None, newest_step=16)
    assert list_checkpoints(storage) == [16]
    remove_partial(storage)
    assert [path.name for path in path_of(storage, 16).parent.iterdir()] == ["step_00000016"]


def test_retention_keeps_the_newest_and_never_loses_the_only_whole_one(storage: Storage) -> None:
    for step in (4, 8, 12, 16):
        write_checkpoint(storage, step)
    truncate(storage, f"{checkpoint_name(16)}/rank_00000.safetensors")  # damaged, of a later step than the resumed run
    write_checkpoint(storage, 14)
    remove_old_checkpoints(storage, keep_latest=1, keep_every_n_steps=None, newest_step=14)
    assert list_checkpoints(storage) == [14, 16]
    newest = newest_whole_checkpoint(storage)
    assert newest is not None
    assert newest.step == 14


def test_every_nth_checkpoint_stays_for_good(storage: Storage) -> None:
    for step in (2, 4, 6, 8, 10, 12):
        write_checkpoint(storage, step)
        remove_old_checkpoints(storage, keep_latest=2, keep_every_n_steps=4, newest_step=step)
    assert list_checkpoints(storage) == [4, 8, 10, 12]


def test_what_stays_for_good_must_be_among_what_is_written() -> None:
    with pytest.raises(ValueError, match=r"multiple of every_n_steps = 400, got 1000; use 800 or 1200"):
        CheckpointConfig(every_n_steps=400, keep_every_n_steps=1000)


def test_checkpoint_moves_with_its_run(tmp_path: Path) -> None:
    write_checkpoint(LocalStorage(tmp_path / "a"), 8)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert newest_whole_checkpoint(LocalStorage(tmp_path / "b")) is not None


def test_a_checkpoint_appears_under_its_name_in_one_rename(storage: Storage) -> None:
    prepare(storage, 5)
    prepared = Path(storage.url_of(prepared_name(storage, 5)))
    inode = prepared.stat().st_ino
    commit_checkpoint(storage, record_of(5))
    assert path_of(storage, 5).stat().st_ino == inode
    assert not prepared.exists()


def test_a_checkpoint_is_on_disk_before_its_name_and_its_name_before_the_commit_returns(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record_disk_calls(monkeypatch, root=Path(storage.url_of("")))
    write_checkpoint(storage, 5)
    assert calls[-2:] == ["rename to checkpoints/step_00000005", "fsync checkpoints"]
    written = [f"checkpoints/step_00000005.partial/{name}" for name in (*FILES, "record.json")]
    assert [calls.count(f"rename to {name}") for name in written] == [1, 1, 1]
    for name in written:  # each name on disk
        assert "fsync checkpoints/step_00000005.partial" in calls[calls.index(f"rename to {name}") :]
