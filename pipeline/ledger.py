"""The files of a shard set that speak of its shards: one commit record per work unit, poison, and the manifest.

The invariant: a record is written after everything it speaks of was committed. A unit of which nothing was written has
a record and no shard. The manifest comes last, holds no times, and so has the same bytes on every rerun.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Literal, TypeVar

from pydantic import NonNegativeInt, ValidationError

from pipeline.config import RulesConfig
from pipeline.rejects import Counts
from pipeline.shards import ShardInfo
from pipeline.storage import ArtifactError, FileInfo, Storage, next_action
from tokenization.config import Config, TokenizerConfig, ViewsConfig
from tokenization.fingerprint import Fingerprint
from tokenization.messages import reason_of

MANIFEST_NAME = "manifest.json"
_File = TypeVar("_File", "LedgerRecord", "PoisonRecord", "Manifest")


class NewerVersionError(ArtifactError):
    """A file that a newer tensorar wrote: nothing of it may be taken for damaged and made anew."""


class Retried(Config):
    """What an appended unit tried again; present only in its record."""

    keys: list[str]
    """Keys of the rejects that were tried again, in order: position i of the unit is `keys[i]`."""
    rejected_by_reason: dict[str, int]
    """Why they had been rejected, by `stage/reason`."""
    inputs: dict[str, str]
    """Fingerprint of each work unit that they were read from, by its digits, as the input stood then."""


class LedgerRecord(Config):
    """The commit record of one work unit."""

    version: Literal[1] = 1
    """Version of this format."""
    unit_index: NonNegativeInt
    """Number of the unit."""
    unit: str
    """What a person calls it."""
    unit_fingerprint: str
    """Of the names and sizes of its input files."""
    input_mark: str
    """Of the modification times (S3: ETags) of its input files; if it changed, `input_sha256` decides. An appended unit
    has the marks of all in `retried.inputs`, in that order, with spaces; empty in records of before."""
    input_sha256: str
    """Of all that was read."""
    fingerprint_digest: str
    """Of the tokenizer, `Fingerprint.digest`."""
    counts: Counts
    """Where its samples went."""
    shard: ShardInfo | None
    """What was written; none if that is nothing."""
    shard_mark: str
    """Modification time in ns (S3: ETag) of the shard when it was committed; empty without one."""
    seconds_of_stage: dict[str, float]
    """Seconds spent in each stage; a record's only part that differs between runs besides the marks."""
    retried: Retried | None = None
    """For units that `retry-rejects` appended: what they tried again."""


class PoisonRecord(Config):
    """A work unit that was set aside after it failed `max_attempts` times; the next run tries it again."""

    version: Literal[1] = 1
    """Version of this format."""
    unit_index: NonNegativeInt
    """Number of the unit."""
    unit: str
    """What a person calls it."""
    problems: list[str]
    """What went wrong in each attempt."""


class Manifest(Config):
    """What a shard set is."""

    version: Literal[1] = 1
    """Version of the shard format."""
    fingerprint: Fingerprint
    """Of the tokenizer that made the codes."""
    tokenizer: TokenizerConfig
    """How it was asked for."""
    views: ViewsConfig
    """Which views each sample has."""
    rules: RulesConfig
    """What was dropped on purpose."""
    num_samples: NonNegativeInt
    """Samples over all shards."""
    num_views: NonNegativeInt
    """Views per sample."""
    codes_per_image: NonNegativeInt
    """Codes per view."""
    class_names: list[str] | None
    """Names in label order, if the source has them."""
    shards: list[ShardInfo]
    """In order of their units."""
    poison_units: list[NonNegativeInt]
    """Units that were set aside; nothing of them is in the set."""
    totals: Counts
    """Where the samples of all units went; a retried reject counts once, where it ended."""


def shard_name(stem: str) -> str:
    """Return the name of a unit's shard, `stem` being the unit's digits."""
    return f"shards/{stem}.tar"


def index_name(stem: str) -> str:
    """Return the name of the index of a unit's shard."""
    return f"shards/{stem}.tar.idx"


def record_name(stem: str) -> str:
    """Return the name of a unit's ledger record."""
    return f"ledger/{stem}.json"


def rejects_name(stem: str) -> str:
    """Return the name of a unit's rejects."""
    return f"rejects/{stem}.parquet"


def poison_name(stem: str) -> str:
    """Return the name of the record of a unit that was set aside."""
    return f"poison/{stem}.json"


def stem_of(name: str) -> str:
    """Return a unit's digits from the name of any of its files."""
    return name.rpartition("/")[2].partition(".")[0]


def files_problem(record: LedgerRecord, *, stem: str, files: Mapping[str, FileInfo]) -> str | None:
    """Return what is wrong with the files of a record by a listing alone, or None.

    Args:
        record: of the unit.
        stem: the unit's digits.
        files: at least all files of the unit, by name.
    """
    if record.counts.num_read > record.counts.num_written and rejects_name(stem) not in files:
        return "its rejects are missing"
    if record.shard is None:
        return None
    for name in (shard_name(stem), index_name(stem)):
        if name not in files:
            return f"{PurePosixPath(name).name} is missing"
    num_bytes = files[shard_name(stem)].num_bytes
    if num_bytes != record.shard.bytes:
        return f"{record.shard.name} must have {record.shard.bytes} bytes, got {num_bytes}"
    num_bytes = files[index_name(stem)].num_bytes
    if num_bytes != 8 * (record.shard.num_samples + 1):
        return f"{record.shard.name}.idx must have {record.shard.num_samples + 1} offsets, got {num_bytes} bytes"
    return None


def write_record(storage: Storage, stem: str, record: LedgerRecord) -> FileInfo:
    """Commit a ledger record; its shard, index and rejects must be committed already."""
    return storage.write_json(record_name(stem), record.model_dump(mode="json"))


def read_record(storage: Storage, stem: str) -> LedgerRecord:
    """Return a ledger record.

    Raises:
        ArtifactError: it is missing, no JSON, of another version, or does not balance.
    """
    return _read(storage, record_name(stem), LedgerRecord)


def parse_record(storage: Storage, stem: str, data: bytes) -> LedgerRecord:
    """Return the ledger record that `data` holds.

    Raises:
        ArtifactError: as `read_record`.
    """
    return _parse(storage, record_name(stem), data, LedgerRecord)


def write_poison(storage: Storage, stem: str, record: PoisonRecord) -> None:
    """Set a unit aside; whatever it committed in earlier runs must be gone already."""
    storage.write_json(poison_name(stem), record.model_dump(mode="json"))


def read_poison(storage: Storage, stem: str) -> PoisonRecord:
    """Return the record of a unit that was set aside.

    Raises:
        ArtifactError: it is missing, no JSON or of another version.
    """
    return _read(storage, poison_name(stem), PoisonRecord)


def write_manifest(storage: Storage, manifest: Manifest) -> None:
    """Commit the manifest of a finished set."""
    storage.write_json(MANIFEST_NAME, manifest.model_dump(mode="json"))


def read_manifest(storage: Storage) -> Manifest:
    """Return the manifest of a shard set.

    Raises:
        ArtifactError: it is missing (the job did not finish), no JSON, or of another version.
    """
    return _read(storage, MANIFEST_NAME, Manifest)


def _read(storage: Storage, name: str, model: type[_File]) -> _File:
    try:
        data = storage.read_bytes(name)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        action = next_action(error, otherwise="finish the tokenize job that writes it")
        raise ArtifactError(f"read {storage.url_of(name)}: {reason}; {action}") from error
    return _parse(storage, name, data, model)


def _parse(storage: Storage, name: str, data: bytes, model: type[_File]) -> _File:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise _error_of(f"read {storage.url_of(name)}", data, error) from error


def _error_of(doing: str, data: bytes, error: ValidationError) -> ArtifactError:
    """Return what is wrong with a file and what to do; one of a newer version may be whole."""
    update = "update tensorar, a newer one wrote it"
    with contextlib.suppress(ValueError):
        value = json.loads(data)
        if isinstance(value, dict) and isinstance(version := value.get("version"), int) and version > 1:
            return NewerVersionError(f"{doing}: version must be 1, got {version}; {update}")
    problem = f"{doing}: {reason_of(error)}"
    if all(each["type"] == "extra_forbidden" for each in error.errors()):
        return NewerVersionError(f"{problem}; {update}")
    return ArtifactError(f"{problem}; remove it and rerun the tokenize job")
