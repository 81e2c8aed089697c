"""Checkpoint directories: whole or not, found by verifying, damaged ones named and passed over."""

import logging
import shutil
from pathlib import Path

import pytest
from synthetic_shards import fingerprint_of

from pipeline.storage import ArtifactError
from training.checkpoint import (
    CheckpointRecord,
    checkpoint_path,
    commit_checkpoint,
    hash_files,
    list_checkpoints,
    newest_whole_checkpoint,
    partial_path,
    read_record,
    remove_old_checkpoints,
    remove_partial,
    verify_checkpoint,
)

FILES = {"model.safetensors": b"weights" * 100, "engine/optim_states.pt": b"moments" * 300}


def record_of(partial: Path, step: int) -> CheckpointRecord:
    return CheckpointRecord(
        step=step,
        samples_consumed=step * 16,
        world_size=2,
        zero_stage=2,
        fingerprint=fingerprint_of(),
        spec={"kind": "train"},
        packages={"torch": "2"},
        files=tuple(hash_files(partial, FILES)),
    )


def write_checkpoint(run_dir: Path, step: int, *, is_committed: bool = True) -> Path:
    path = checkpoint_path(run_dir, step)
    partial = partial_path(path)
    for name, data in FILES.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(data + str(step).encode())
    if is_committed:
        commit_checkpoint(path, record_of(partial, step))
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def remove(path: Path) -> None:
    path.unlink()


def test_committed_checkpoint_is_whole_and_newest_first(tmp_path: Path) -> None:
    for step in (8, 100, 20):
        write_checkpoint(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000008", "step_00000020", "step_00000100"]
    newest = newest_whole_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoints" / "step_00000100"
    assert verify_checkpoint(newest) == []
    assert read_record(newest).samples_consumed == 1600


def test_run_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert newest_whole_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path, 5, is_committed=False)
    assert newest_whole_checkpoint(tmp_path) is None


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove])
@pytest.mark.parametrize("name", [*FILES, "record.json"])
def test_damaged_newest_is_passed_over_and_named(
    tmp_path: Path, name: str, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    older, newest = write_checkpoint(tmp_path, 8), write_checkpoint(tmp_path, 16)
    assert callable(damage)
    damage(newest / name)
    with caplog.at_level(logging.WARNING):
        assert newest_whole_checkpoint(tmp_path) == older
    assert "step_00000016" in caplog.text
    assert name in caplog.text


def test_all_damaged_is_an_error_and_never_a_start_from_zero(tmp_path: Path) -> None:
    for step in (8, 16):
        truncate(write_checkpoint(tmp_path, step) / "model.safetensors")
    with pytest.raises(ArtifactError, match="got 2 damaged ones"):
        newest_whole_checkpoint(tmp_path)


def test_renamed_checkpoint_is_not_whole(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 8)
    path.rename(path.with_name("step_00000009"))
    assert verify_checkpoint(path.with_name("step_00000009")) == ["step_00000009: record.json is of step 8"]


def test_commit_refuses_files_that_nobody_hashed(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 8, is_committed=False)
    record = record_of(partial_path(path), 8)
    (partial_path(path) / "engine" / "stray.pt").write_bytes(b"?")
    with pytest.raises(ArtifactError, match=r"engine/stray\.pt"):
        commit_checkpoint(path, record)
    assert not path.exists()


def test_commit_replaces_a_damaged_one_of_the_same_step(tmp_path: Path) -> None:
    truncate(write_checkpoint(tmp_path, 8) / "model.safetensors")
    path = write_checkpoint(tmp_path, 8)
    assert verify_checkpoint(path) == []


def test_leftovers_of_a_killed_save_are_removed_and_nothing_else(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path, 8)
    write_checkpoint(tmp_path, 16, is_committed=False)
    remove_partial(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == [whole]


def test_retention_keeps_the_newest_and_never_loses_the_only_whole_one(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        write_checkpoint(tmp_path, step)
    truncate(write_checkpoint(tmp_path, 16) / "model.safetensors")  # damaged, with a higher step than the resumed run's
    write_checkpoint(tmp_path, 14)
    remove_old_checkpoints(tmp_path, keep_latest=1, newest_step=14)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000014", "step_00000016"]
    newest = newest_whole_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "step_00000014"


def test_checkpoint_moves_with_its_run(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", 8)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert newest_whole_checkpoint(tmp_path / "b") == tmp_path / "b" / "checkpoints" / "step_00000008"


def test_a_checkpoint_appears_under_its_name_in_one_rename(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 5, is_committed=False)
    prepared = partial_path(path).stat().st_ino
    commit_checkpoint(path, record_of(partial_path(path), 5))
    assert path.stat().st_ino == prepared
    assert not partial_path(path).exists()
