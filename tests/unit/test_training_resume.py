"""Which checkpoint a run may go on from: one of the same tokenizer's codes and of the same samples."""

import logging
from pathlib import Path

import pytest
import torch
from synthetic_checkpoints import prepare, record_of
from synthetic_shards import fingerprint_of, train_config

from pipeline.local_storage import LocalStorage
from pipeline.storage import ArtifactError
from tokenization.fingerprint import Fingerprint
from training.checkpoint import CheckpointRecord, SetRecord, commit_checkpoint
from training.ranks import Ranks
from training.resume import find_checkpoint

TRAINED_ON = SetRecord(num_samples=1000, num_shards=4, sha256="a" * 64)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one checkpoint, of 1,000 samples."""
    storage = LocalStorage(tmp_path / "run")
    prepare(storage, 8)
    commit_checkpoint(storage, record_of(8).model_copy(update={"training_sets": (TRAINED_ON,)}))
    return tmp_path / "run"


def found(run: Path, *, fingerprint: Fingerprint, training_set: SetRecord) -> CheckpointRecord | None:
    return find_checkpoint(
        train_config(run, shards=Path("sets/codes")),
        ranks=Ranks(rank=0, world_size=1, device=torch.device("cpu")),
        fingerprint=fingerprint,
        training_sets=[training_set],
    )


def test_a_run_goes_on_with_the_samples_and_the_tokenizer_that_it_began_with(run: Path) -> None:
    record = found(run, fingerprint=fingerprint_of(), training_set=TRAINED_ON)
    assert record is not None
    assert record.step == 8


def test_what_a_killed_save_left_is_removed_before_the_run_goes_on(run: Path) -> None:
    prepare(LocalStorage(run), 16)
    record = found(run, fingerprint=fingerprint_of(), training_set=TRAINED_ON)
    assert record is not None
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000008"]


def test_a_run_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    prepare(LocalStorage(tmp_path / "run"), 16)
    assert found(tmp_path / "run", fingerprint=fingerprint_of(), training_set=TRAINED_ON) is None


def test_codes_of_another_tokenizer_are_refused(run: Path) -> None:
    with pytest.raises(
        ArtifactError,
        match=r"resume .*/step_00000008: codes must come from tokenizer [0-9a-f]+, got [0-9a-f]+; point data\.shards",
    ):
        found(run, fingerprint=fingerprint_of("1" * 64), training_set=TRAINED_ON)


@pytest.mark.parametrize(
    "change", [{"num_samples": 1001}, {"num_shards": 5}, {"sha256": "b" * 64}], ids=["samples", "shards", "contents"]
)
def test_other_samples_are_refused_with_both_sets_named(run: Path, change: dict[str, object]) -> None:
    other = TRAINED_ON.model_copy(update=change)
    told = f"{other.num_samples} in {other.num_shards} shards \\({other.sha256[:8]}..\\)"
    with pytest.raises(
        ArtifactError,
        match=r"resume .*/step_00000008: sets/codes must hold the samples that it was trained on, 1000 in 4 shards "
        rf"\(aaaaaaaa\.\.\), got {told}; put that set back",
    ):
        found(run, fingerprint=fingerprint_of(), training_set=other)


def test_a_record_that_does_not_name_its_samples_is_trusted_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = LocalStorage(tmp_path / "run")
    prepare(storage, 8)
    commit_checkpoint(storage, record_of(8))
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path / "run", fingerprint=fingerprint_of(), training_set=TRAINED_ON) is not None
    assert "resume step=8: its record does not say what it was trained on; the spec is trusted" in caplog.text
