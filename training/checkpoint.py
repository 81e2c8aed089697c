"""Checkpoints in a run's storage: a directory is whole, or it is not a checkpoint.

Invariant: the ranks' files are hashed as they are written and fsynced, `record.json` (sizes, hashes, step, world size,
spec) is written last, and on a file system one rename makes `step_00001000.partial` into `step_00001000`; on S3 the
record itself is that moment. Finding one means listing and verifying, never trusting a pointer; a damaged one is
skipped loudly, one that cannot be read just now is not: it may be whole. There are no pickles in it. Verifying costs
one read of the files. Light: imports no torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.local_storage import LocalStorage, raise_outage, rename, sha256_of_file
from pipeline.storage import ArtifactError, Storage, StorageUnavailableError, sha256_of_stream
from tokenization.config import Config
from tokenization.fingerprint import Fingerprint
from tokenization.messages import reason_of

if TYPE_CHECKING:
    from pipeline.ledger import Manifest

logger = logging.getLogger(__name__)

RECORD = "record.json"
RECORD_VERSION = 2
CHECKPOINTS = "checkpoints"
NUM_HASHING_THREADS = 8
NOT_TO_BE_READ = (StorageUnavailableError, PermissionError)
"""What reading a checkpoint fails with where it may be whole."""
_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL = ".partial"


class RunState(Config):
    """Where a run is, beside its tensors."""

    step: int
    """Steps taken."""
    samples_consumed: int
    """Position of the loader."""
    num_skipped_steps: int = 0
    """Steps that were skipped because loss or gradient norm was not finite."""
    num_replaced_samples: int = 0
    """Damaged samples that others took the place of."""


class FileRecord(Config):
    """One file of a checkpoint."""

    name: str
    """Name in the checkpoint's directory."""
    num_bytes: int
    sha256: str


class SetRecord(Config):
    """What a shard set holds, wherever it lies: the order of its samples is a function of that."""

    num_samples: int
    num_shards: int
    sha256: str
    """Over the number of samples and the sha256 of each shard, in order."""


class CheckpointRecord(Config):
    """What `record.json` says: all that a checkpoint is, but for the tensors."""

    version: int = RECORD_VERSION
    step: int
    """Steps taken."""
    samples_consumed: int
    """Position of the loader."""
    num_skipped_steps: int = 0
    """Steps that were skipped because loss or gradient norm was not finite."""
    num_replaced_samples: int = 0
    """Damaged samples that others took the place of."""
    optimizer_steps: int
    """Steps that the optimiser counts."""
    world_size: int
    """Of the run that wrote it; any other may read it."""
    zero_stage: int
    """Of the run that wrote it; any other may read it."""
    kinds: tuple[str, ...]
    """States that are kept of every element: `weights`, Adam's moments, `ema` where there is one."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter."""
    fingerprint: Fingerprint
    """Tokenizer of the codes trained on."""
    training_sets: tuple[SetRecord, ...] = ()
    """The sets trained on, in the order of the mixture; none in a record of before."""
    spec: dict[str, Any]
    """The resolved train spec."""
    packages: dict[str, str]
    """Versions of torch, deepspeed and tensorar."""
    files: tuple[FileRecord, ...]
    """One for each rank that wrote it, in rank order."""
    record_sha256: str = ""
    """Of the canonical JSON of all other fields; filled in when the record is written."""

    @property
    def state(self) -> RunState:
        """Where the run was."""
        return RunState(**{name: getattr(self, name) for name in RunState.model_fields})

    def digest(self) -> str:
        """Return what `record_sha256` must be."""
        later = {name for name in ("training_sets", "num_replaced_samples") if not getattr(self, name)}  # than some
        canonical = json.dumps(self.model_dump(mode="json", exclude={"record_sha256", *later}), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


def set_record(manifest: Manifest) -> SetRecord:
    """Return what a checkpoint remembers of the shard set with this manifest."""
    lines = "".join(f"{shard.num_samples} {shard.sha256}\n" for shard in manifest.shards)
    return SetRecord(
        num_samples=manifest.num_samples,
        num_shards=len(manifest.shards),
        sha256=hashlib.sha256(lines.encode()).hexdigest(),
    )


def checkpoint_name(step: int) -> str:
    """Return the directory of the checkpoint of `step`, below the run's."""
    return f"{CHECKPOINTS}/step_{step:08d}"


def prepared_name(storage: Storage, step: int) -> str:
    """Return the directory that the checkpoint of `step` is prepared in, below the run's.

    On S3 it is the checkpoint's own: nothing can be renamed there, and what has no record is no checkpoint.
    """
    return checkpoint_name(step) + (_PARTIAL if isinstance(storage, LocalStorage) else "")


def rank_file_name(rank: int) -> str:
    """Return the name of a rank's file in a checkpoint."""
    return f"rank_{rank:05d}.safetensors"


def step_in_name(name: str) -> int | None:
    """Return the step of a checkpoint's directory name; none where it is no such name."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])


def list_checkpoints(storage: Storage) -> list[int]:
    """Return the steps of the committed checkpoints of a run, oldest first, unverified."""
    if isinstance(storage, LocalStorage):  # only a rename makes the name, so one that lost its record is listed too
        directories = set(LocalStorage(storage.root / CHECKPOINTS).folders())  # and not the files of every rank in them
    else:  # without a record it is a leftover
        names = (name.split("/") for name in storage.list(f"{CHECKPOINTS}/"))
        directories = {parts[1] for parts in names if parts[2:] == [RECORD]}
    return sorted(step for step in map(step_in_name, directories) if step is not None)


def read_record(storage: Storage, step: int) -> CheckpointRecord:
    """Return the record of the checkpoint of `step`.

    Raises:
        ArtifactError: it is missing, damaged or of another version.
    """
    name = checkpoint_name(step)
    doing = f"read checkpoint {storage.url_of(name)}"
    try:
        values = json.loads(storage.read_bytes(f"{name}/{RECORD}"))
        version = values.get("version") if isinstance(values, dict) else None
        if version != RECORD_VERSION:
            raise ArtifactError(
                f"{doing}: version in {RECORD} must be {RECORD_VERSION}, got {version!r}; go on with the tensorar that "
                "wrote it, or begin a new run_dir with warm_start from its weights"
            )
        record = CheckpointRecord.model_validate(values)
    except FileNotFoundError:
        raise ArtifactError(f"{doing}: {RECORD} is missing; use another checkpoint") from None
    except ValueError as error:  # pydantic's included
        raise ArtifactError(f"{doing}: {RECORD} is damaged ({reason_of(error)}); use another checkpoint") from None
    if record.record_sha256 != record.digest():
        raise ArtifactError(f"{doing}: {RECORD} does not match its own sha256; use another checkpoint")
    return record


def verify_checkpoint(storage: Storage, step: int, *, rank: int = 0, world_size: int = 1) -> list[str]:
    """Return what is wrong with a checkpoint, one line per file; nothing when it is whole.

    Args:
        storage: of the run.
        step: of the checkpoint.
        rank: of those who verify it together: each reads every `world_size`-th file.
        world_size: how many they are.

    Raises:
        StorageUnavailableError, PermissionError: it cannot be read just now; it may be whole.
    """
    name = checkpoint_name(step)
    try:
        record = read_record(storage, step)
    except NOT_TO_BE_READ:
        raise
    except (ArtifactError, OSError) as error:
        return [str(error)]
    with ThreadPoolExecutor(min(NUM_HASHING_THREADS, os.cpu_count() or 1)) as threads:
        found = threads.map(lambda file: _problem_of_file(storage, name, file), record.files[rank::world_size])
        problems = [problem for problem in found if problem is not None]
    if record.step != step:
        problems.append(f"{name}: {RECORD} is of step {record.step}")
    return problems


def _problem_of_file(storage: Storage, directory: str, file: FileRecord) -> str | None:
    name = f"{directory}/{file.name}"
    told = name.removeprefix(f"{CHECKPOINTS}/")
    try:
        info = storage.find(name)
        if info is None:
            return f"{told} is missing"
        if info.num_bytes != file.num_bytes:
            return f"{told} has {info.num_bytes} bytes, its record says {file.num_bytes}"
        digest = _sha256_of(storage, name)
    except NOT_TO_BE_READ:
        raise
    except (ArtifactError, OSError) as error:
        return f"{told} cannot be read ({error})"
    if digest != file.sha256:
        return f"{told}: sha256 differs from its record (want {file.sha256[:8]}.., got {digest[:8]}..)"
    return None


def _sha256_of(storage: Storage, name: str) -> str:
    if not isinstance(storage, LocalStorage):
        with storage.open(name) as file:  # in blocks: several threads are at work, and a few ranks have large files
            return sha256_of_stream(file)
    try:
        return sha256_of_file(storage.root / name)
    except OSError as error:
        if error.errno != errno.EIO:  # a bad sector's too, which is damage
            raise_outage(error, doing=f"read {storage.url_of(name)}")
        raise


def newest_whole_checkpoint(storage: Storage) -> CheckpointRecord | None:
    """Return the record of a run's newest checkpoint whose every file verifies; none where there never was one.

    Raises:
        ArtifactError: there are checkpoints and all are damaged; starting anew must be somebody's decision.
        StorageUnavailableError, PermissionError: one that may be whole cannot be read just now.
    """
    steps = list_checkpoints(storage)
    problems: list[str] = []
    for step in reversed(steps):
        problems = verify_checkpoint(storage, step)
        if not problems:
            return read_record(storage, step)
        warn_of_damage(storage, step, problems)
    if steps:
        raise all_damaged(storage, steps, problems)
    return None


def newest_record(storage: Storage) -> CheckpointRecord | None:
    """Return the newest record that can be read, its files unverified; none where there is no checkpoint.

    Raises:
        ArtifactError: there are checkpoints, and no record can be read.
        StorageUnavailableError, PermissionError: one that may be whole cannot be read just now.
    """
    problem: ArtifactError | None = None
    for step in reversed(list_checkpoints(storage)):
        try:
            return read_record(storage, step)
        except StorageUnavailableError:
            raise
        except ArtifactError as error:
            problem = error
    if problem is not None:
        raise problem
    return None


def warn_of_damage(storage: Storage, step: int, problems: Sequence[str]) -> None:
    """Log that a checkpoint is passed over, and why."""
    url = storage.url_of(checkpoint_name(step))
    logger.warning("checkpoint %s is damaged and skipped: %s", url, "; ".join(problems))


def all_damaged(storage: Storage, steps: Sequence[int], problems: Sequence[str]) -> ArtifactError:
    """Return the error for a run whose checkpoints are all damaged; `problems` are those of the oldest."""
    return ArtifactError(
        f"resume {storage}: a checkpoint must be whole, got {len(steps)} damaged ones (of the oldest: {problems[0]}); "
        f"put back their files, or move {storage.url_of(CHECKPOINTS)} away to start from step 0"
    )


def commit_checkpoint(storage: Storage, record: CheckpointRecord) -> None:
    """Make a checkpoint whose files are in `prepared_name` visible: its record last, then, on a file system, the name.

    What else lies there (the ranks' reports) is removed. An older, damaged checkpoint of the same step is replaced.

    Raises:
        ArtifactError: a file of the record is not there.
    """
    prepared, name = prepared_name(storage, record.step), checkpoint_name(record.step)
    found = {path.removeprefix(f"{prepared}/"): info.num_bytes for path, info in storage.list(f"{prepared}/").items()}
    for file in record.files:
        if found.pop(file.name, None) != file.num_bytes:
            raise ArtifactError(
                f"save checkpoint {storage.url_of(name)}: {file.name} must be there with {file.num_bytes} bytes, got "
                "none or another; check that all ranks see one file system"
            )
    storage.remove_all(f"{prepared}/{stray}" for stray in found)
    signed = record.model_copy(update={"record_sha256": record.digest()})
    storage.write_json(f"{prepared}/{RECORD}", signed.model_dump(mode="json"))
    if isinstance(storage, LocalStorage):
        path = storage.root / name
        if path.exists():
            _remove_directory(path)
        rename(storage.root / prepared, path)  # whoever wrote a file of it has fsynced it


def remove_partial(storage: Storage) -> None:
    """Remove what a killed save left behind; no other process may be saving."""
    if isinstance(storage, LocalStorage):
        directory = storage.root / CHECKPOINTS
        for path in directory.glob(f"*{_PARTIAL}") if directory.is_dir() else ():
            shutil.rmtree(path)
        return
    storage.remove_staged()
    whole = {checkpoint_name(step) for step in list_checkpoints(storage)}
    listed = storage.list(f"{CHECKPOINTS}/step_")
    storage.remove_all(name for name in listed if name.rpartition("/")[0] not in whole)


def remove_old_checkpoints(
    storage: Storage, *, keep_latest: int, keep_every_n_steps: int | None, newest_step: int
) -> None:
    """Remove all but the newest `keep_latest` checkpoints up to `newest_step`, which is the one just committed.

    So the newest whole one always stays, even where a damaged one has a higher step. Those whose step is a multiple of
    `keep_every_n_steps` stay too.
    """
    committed = [step for step in list_checkpoints(storage) if step <= newest_step]
    for step in committed[:-keep_latest]:
        if keep_every_n_steps is None or step % keep_every_n_steps:
            _remove_checkpoint(storage, step)


def _remove_checkpoint(storage: Storage, step: int) -> None:
    name = checkpoint_name(step)
    if isinstance(storage, LocalStorage):
        _remove_directory(storage.root / name)
        return
    storage.remove(f"{name}/{RECORD}")  # first: without it the rest is a leftover
    storage.remove_all(storage.list(f"{name}/"))


def _remove_directory(path: Path) -> None:
    """Remove a checkpoint's directory; a kill in the middle must not leave one that looks like a checkpoint."""
    doomed = path.with_name(f"{path.name}.removed{_PARTIAL}")
    path.rename(doomed)
    shutil.rmtree(doomed)
