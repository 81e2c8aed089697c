"""Checkpoint directories: whole or not, found by verifying, damaged ones named and passed over; local and on S3."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_shards import fingerprint_of

from pipeline.local_storage import LocalStorage
from pipeline.storage import ArtifactError, Storage, open_storage, sha256_of
from training.checkpoint import (
    CheckpointRecord,
    FileRecord,
    checkpoint_name,
    commit_checkpoint,
    list_checkpoints,
    newest_whole_checkpoint,
    prepared_name,
    read_record,
    remove_old_checkpoints,
    remove_partial,
    verify_checkpoint,
)
from training.config import CheckpointConfig

FILES = {"rank_00000.safetensors": b"weights" * 100, "rank_00001.safetensors": b"moments" * 300}


def record_of(step: int) -> CheckpointRecord:
    files = [(name, data + str(step).encode()) for name, data in FILES.items()]
    return CheckpointRecord(
        step=step,
        samples_consumed=step * 16,
        num_skipped_steps=1,
        optimizer_steps=step - 1,
        world_size=2,
        zero_stage=2,
        kinds=("weights",),
        shapes={"a": (3, 4)},
        fingerprint=fingerprint_of(),
        spec={"kind": "train"},
        packages={"torch": "2"},
        files=tuple(FileRecord(name=name, num_bytes=len(data), sha256=sha256_of(data)) for name, data in files),
    )


def prepare(storage: Storage, step: int) -> None:
    for name, data in FILES.items():
        storage.write_bytes(f"{prepared_name(storage, step)}/{name}", data + str(step).encode())
        storage.write_bytes(f"{prepared_name(storage, step)}/{name}.report.json", b"{}")


def write_checkpoint(storage: Storage, step: int) -> None:
    prepare(storage, step)
    commit_checkpoint(storage, record_of(step))


def truncate(storage: Storage, name: str) -> None:
    storage.write_bytes(name, storage.read_bytes(name)[:-3])


def flip_a_bit(storage: Storage, name: str) -> None:
    data = bytearray(storage.read_bytes(name))
    data[len(data) // 2] ^= 1
    storage.write_bytes(name, bytes(data))


def remove(storage: Storage, name: str) -> None:
    storage.remove(name)


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
    assert newest.state.model_dump() == {"step": 100, "samples_consumed": 1600, "num_skipped_steps": 1}
    names = sorted(path.name for path in path_of(storage, 100).iterdir())
    assert names == ["rank_00000.safetensors", "rank_00001.safetensors", "record.json"]


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


def test_commit_refuses_a_file_that_did_not_arrive(storage: Storage) -> None:
    prepare(storage, 8)
    storage.remove(f"{prepared_name(storage, 8)}/rank_00001.safetensors")
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


def test_on_s3_a_checkpoint_is_what_has_a_record_and_the_rest_is_removed(s3_url: str) -> None:
    storage = open_storage(s3_url)
    for step in (4, 8, 12):
        write_checkpoint(storage, step)
    prepare(storage, 16)
    remove_old_checkpoints(storage, keep_latest=2, keep_every_n_steps=None, newest_step=12)
    assert list_checkpoints(storage) == [8, 12]
    flip_a_bit(storage, f"{checkpoint_name(12)}/rank_00001.safetensors")
    newest = newest_whole_checkpoint(storage)
    assert newest is not None
    assert newest.step == 8
    remove_partial(storage)
    directories = {name.split("/")[1] for name in storage.list("checkpoints/")}
    assert directories == {"step_00000008", "step_00000012"}
