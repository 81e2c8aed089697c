"""Checkpoints on disk: a directory is whole, or it is not a checkpoint.

Invariant: every file is fsynced and hashed by the rank that wrote it, `record.json` (sizes, hashes, step, world size,
spec) is written last, and one rename makes `step_00001000.partial` into `step_00001000`. Finding one means listing and
verifying, never trusting a pointer; a damaged one is skipped loudly. Nothing is unpickled before it is verified.
Verifying costs one read of the files (about 1 GB/s of sha256). Light: imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.local_storage import sha256_of_file, write_json
from pipeline.storage import ArtifactError
from tokenization.config import Config
from tokenization.fingerprint import Fingerprint

logger = logging.getLogger(__name__)

RECORD = "record.json"
MODEL_FILE = "model.safetensors"
RECORD_VERSION = 1
_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL = ".partial"


class FileRecord(Config):
    """One file of a checkpoint."""

    name: str
    """Path below the checkpoint directory."""
    num_bytes: int
    sha256: str


class CheckpointRecord(Config):
    """What `record.json` says: all that a checkpoint is, but for the tensors."""

    version: int = RECORD_VERSION
    step: int
    """Steps taken."""
    samples_consumed: int
    """Position of the loader."""
    world_size: int
    zero_stage: int
    fingerprint: Fingerprint
    """Tokenizer of the codes trained on."""
    spec: dict[str, Any]
    """The resolved train spec."""
    packages: dict[str, str]
    """Versions of torch, deepspeed and tensorar."""
    files: tuple[FileRecord, ...]
    record_sha256: str = ""
    """Of the canonical JSON of all other fields; filled in when the record is written."""

    def digest(self) -> str:
        """Return what `record_sha256` must be."""
        canonical = json.dumps(self.model_dump(mode="json", exclude={"record_sha256"}), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


def checkpoints_dir(run_dir: Path) -> Path:
    """Return the directory that holds the checkpoints of a run."""
    return run_dir / "checkpoints"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the directory of the checkpoint of `step`."""
    return checkpoints_dir(run_dir) / f"step_{step:08d}"


def partial_path(path: Path) -> Path:
    """Return where the checkpoint `path` is prepared."""
    return path.with_name(path.name + _PARTIAL)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the committed checkpoint directories of a run, oldest first, unverified."""
    directory = checkpoints_dir(run_dir)
    paths = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)] if directory.is_dir() else []
    return sorted(paths, key=step_of_checkpoint)


def step_of_checkpoint(path: Path) -> int:
    """Return the step in a checkpoint directory's name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def read_record(path: Path) -> CheckpointRecord:
    """Return the record of a checkpoint directory.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    try:
        record = CheckpointRecord.model_validate_json((path / RECORD).read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"read checkpoint {path}: {RECORD} is missing; use another checkpoint") from None
    except (ValidationError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"read checkpoint {path}: {RECORD} is damaged ({reason}); use another checkpoint") from None
    if record.record_sha256 != record.digest():
        raise ArtifactError(f"read checkpoint {path}: {RECORD} does not match its own sha256; use another checkpoint")
    return record


def verify_checkpoint(path: Path) -> list[str]:
    """Return what is wrong with a checkpoint directory, one line per file; nothing when it is whole."""
    try:
        record = read_record(path)
    except ArtifactError as error:
        return [str(error)]
    problems = [_problem_of_file(path, file) for file in record.files]
    if record.step != step_of_checkpoint(path):
        problems.append(f"{path.name}: {RECORD} is of step {record.step}")
    return [problem for problem in problems if problem is not None]


def _problem_of_file(path: Path, file: FileRecord) -> str | None:
    full = path / file.name
    if not full.is_file():
        return f"{path.name}/{file.name} is missing"
    if full.stat().st_size != file.num_bytes:
        return f"{path.name}/{file.name} has {full.stat().st_size} bytes, its record says {file.num_bytes}"
    digest = sha256_of_file(full)
    if digest != file.sha256:
        return f"{path.name}/{file.name}: sha256 differs from its record (want {file.sha256[:8]}.., got {digest[:8]}..)"
    return None


def newest_whole_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint of a run whose every file verifies; none where there never was one.

    Raises:
        ArtifactError: there are checkpoints and all are damaged; starting anew must be somebody's decision.
    """
    paths = list_checkpoints(run_dir)
    for path in reversed(paths):
        problems = verify_checkpoint(path)
        if not problems:
            return path
        logger.warning("checkpoint %s is damaged and skipped: %s", path, "; ".join(problems))
    if paths:
        raise ArtifactError(
            f"resume {run_dir}: a checkpoint must be whole, got {len(paths)} damaged ones (see the warnings above); "
            f"put back their files, or move {checkpoints_dir(run_dir)} away to start from step 0"
        )
    return None


def hash_files(directory: Path, names: Iterable[str]) -> list[FileRecord]:
    """Return the records of files below `directory`, each fsynced first so that the hash is of what the disk keeps."""
    records = []
    for name in sorted(names):
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())
        full = directory / name
        records.append(FileRecord(name=name, num_bytes=full.stat().st_size, sha256=sha256_of_file(full)))
    return records


def commit_checkpoint(path: Path, record: CheckpointRecord) -> None:
    """Make `partial_path(path)` visible as `path`: write its record, fsync, rename, fsync the parent.

    A damaged or older directory in its place is removed first.

    Raises:
        ArtifactError: the files on disk are not those of the record.
    """
    partial = partial_path(path)
    found = {str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file()}
    expected = {file.name for file in record.files}
    if found != expected:
        raise ArtifactError(
            f"save checkpoint {path}: its files must be hashed by the ranks that wrote them, got a difference in "
            f"{', '.join(sorted(found ^ expected))}; check that all ranks see one file system"
        )
    signed = record.model_copy(update={"record_sha256": record.digest()})
    write_json(partial / RECORD, signed.model_dump(mode="json"))
    for directory in [partial, *(entry for entry in partial.rglob("*") if entry.is_dir())]:
        _fsync_dir(directory)
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    _fsync_dir(path.parent)


def remove_partial(run_dir: Path) -> None:
    """Remove what a killed save left behind."""
    directory = checkpoints_dir(run_dir)
    for path in directory.glob(f"step_*{_PARTIAL}") if directory.is_dir() else ():
        shutil.rmtree(path)


def remove_old_checkpoints(run_dir: Path, *, keep_latest: int, newest_step: int) -> None:
    """Remove all but the newest `keep_latest` checkpoints up to `newest_step`, which is the one just committed.

    So the newest whole one always stays, even where a damaged one has a higher step.
    """
    committed = [path for path in list_checkpoints(run_dir) if step_of_checkpoint(path) <= newest_step]
    for path in committed[:-keep_latest]:
        # A kill in the middle must not leave a directory that looks like a checkpoint.
        doomed = partial_path(path)
        path.rename(doomed)
        shutil.rmtree(doomed)


def _fsync_dir(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
