"""One record per finished work unit, the manifest of the whole set, and the check that all of it is true.

The invariant: a record is written after everything it speaks of was committed. A unit of which nothing was written has
a record and no shard. The manifest comes last, holds no times, and so has the same bytes on every rerun. `verify` reads
every byte of a set; a rerun of the job looks at presence, sizes and modification times only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from pydantic import NonNegativeInt, ValidationError

from pipeline.config import RulesConfig
from pipeline.local_storage import find_staged, sha256_of_file, write_json
from pipeline.npy_codes import codes_dtype
from pipeline.rejects import Counts, add_counts, count, read_rejects
from pipeline.shards import ShardInfo, index_path, open_shard
from pipeline.storage import ArtifactError, open_storage
from tokenization.config import Config, TokenizerConfig, ViewsConfig
from tokenization.fingerprint import Fingerprint


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
    """Of the modification times of its input files; if it changed, `input_sha256` decides."""
    input_sha256: str
    """Of all that was read."""
    fingerprint_digest: str
    """Of the tokenizer, `Fingerprint.digest`."""
    counts: Counts
    """Where its samples went."""
    shard: ShardInfo | None
    """What was written; none if that is nothing."""
    shard_mtime_ns: NonNegativeInt
    """Modification time of the shard when it was committed; 0 without one."""
    seconds_of_stage: dict[str, float]
    """Seconds spent in each stage; a record's only part that differs between runs besides the marks."""


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
    totals: Counts
    """Where the samples of all units went."""


_File = TypeVar("_File", LedgerRecord, Manifest)


def shard_path(run_dir: Path, stem: str) -> Path:
    """Return the path of a unit's shard, `stem` being the unit's digits."""
    return run_dir / "shards" / f"{stem}.tar"


def record_path(run_dir: Path, stem: str) -> Path:
    """Return the path of a unit's ledger record."""
    return run_dir / "ledger" / f"{stem}.json"


def rejects_path(run_dir: Path, stem: str) -> Path:
    """Return the path of a unit's rejects."""
    return run_dir / "rejects" / f"{stem}.parquet"


def write_record(run_dir: Path, stem: str, record: LedgerRecord) -> None:
    """Commit a ledger record; its shard, index and rejects must be committed already."""
    write_json(record_path(run_dir, stem), record.model_dump(mode="json"))


def read_record(path: Path) -> LedgerRecord:
    """Return a ledger record.

    Raises:
        ArtifactError: it is missing, no JSON, of another version, or does not balance.
    """
    return _read(path, LedgerRecord)


def write_manifest(run_dir: Path, manifest: Manifest) -> None:
    """Commit the manifest of a finished set."""
    write_json(run_dir / "manifest.json", manifest.model_dump(mode="json"))


def read_manifest(run_dir: Path) -> Manifest:
    """Return the manifest of a shard set.

    Raises:
        ArtifactError: it is missing (the job did not finish), no JSON, or of another version.
    """
    return _read(Path(run_dir) / "manifest.json", Manifest)


def committed_shard_problem(run_dir: Path, record: LedgerRecord, *, stem: str) -> str | None:
    """Return what is wrong with the files of a record by their presence and sizes alone, or None."""
    if record.counts.num_read > record.counts.num_written and not rejects_path(run_dir, stem).is_file():
        return "its rejects are missing"
    if record.shard is None:
        return None
    shard = shard_path(run_dir, stem)
    index = index_path(shard)
    if not shard.is_file() or not index.is_file():
        return f"{(index if shard.is_file() else shard).name} is missing"
    if shard.stat().st_size != record.shard.bytes:
        return f"{shard.name} must have {record.shard.bytes} bytes, got {shard.stat().st_size}"
    if index.stat().st_size != 8 * (record.shard.num_samples + 1):
        return f"{index.name} must have {record.shard.num_samples + 1} offsets, got {index.stat().st_size} bytes"
    return None


def _read(path: Path, model: type[_File]) -> _File:
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"read {path}: {error.strerror}; finish the tokenize job that writes it") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise ArtifactError(
            f"read {path}: {where}: {first['msg'].lower()}; remove it and rerun the tokenize job"
        ) from error


def verify_shard_set(run_dir: Path) -> list[str]:
    """Return all that is wrong with a shard set, one line each; nothing if it is whole.

    Reads every shard: size, sha256, index, keys, shape and range of the codes, rejects and counts; ledger, shards and
    manifest must speak of the same things.
    """
    run_dir = Path(run_dir)
    problems = [f"{run_dir}: staged leftover {path.name}; rerun the tokenize job" for path in find_staged(run_dir)]
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(run_dir)
    except ArtifactError as error:
        problems.append(str(error))
    records: dict[str, LedgerRecord] = {}
    for path in sorted((run_dir / "ledger").glob("*.json")):
        try:
            records[path.stem] = read_record(path)
        except ArtifactError as error:
            problems.append(str(error))
    problems.extend(_stray_files(run_dir, records))
    for stem, record in records.items():
        problems.extend(f"shard {shard_path(run_dir, stem)}: {text}" for text in _unit_problems(run_dir, stem, record))
        if manifest is not None and record.shard is not None:
            if record.fingerprint_digest != manifest.fingerprint.digest:
                problems.append(
                    f"ledger record {stem}: fingerprint must be the manifest's {manifest.fingerprint.digest}, got "
                    f"{record.fingerprint_digest}; {_REDO}"
                )
            problems.extend(_codes_problems(shard_path(run_dir, stem), record, stem=stem, manifest=manifest))
    if manifest is not None:
        problems.extend(_manifest_problems(run_dir, manifest, list(records.values())))
    return problems


def _stray_files(run_dir: Path, records: dict[str, LedgerRecord]) -> Iterator[str]:
    """Yield a line for each file that no record speaks of, and for each gap in the unit numbers."""
    expected = {record_path(run_dir, stem) for stem in records}
    for stem, record in records.items():
        if record.shard is not None:
            expected |= {shard_path(run_dir, stem), index_path(shard_path(run_dir, stem))}
        if record.counts.num_read > record.counts.num_written:
            expected.add(rejects_path(run_dir, stem))
    for folder in ("shards", "rejects"):
        for path in sorted((run_dir / folder).glob("*")):
            if path not in expected:
                yield f"{path}: no ledger record speaks of it; rerun the tokenize job or remove it"
    for unit_index, (stem, record) in enumerate(sorted(records.items())):
        if not (record.unit_index == unit_index == int(stem if stem.isdigit() else -1)):
            yield f"{run_dir / 'ledger'}: unit {unit_index} must come next, got {stem}.json; rerun the tokenize job"
            return


def _unit_problems(run_dir: Path, stem: str, record: LedgerRecord) -> Iterator[str]:
    problem = committed_shard_problem(run_dir, record, stem=stem)
    if problem is not None:
        yield f"{problem}; {_REDO}"
    path = shard_path(run_dir, stem)
    if record.shard is not None and path.is_file() and path.stat().st_size == record.shard.bytes:
        sha256 = sha256_of_file(path)
        if sha256 != record.shard.sha256:
            want = record.shard.sha256[:8]
            yield f"sha256 differs from its ledger record (want {want}.., got {sha256[:8]}..); {_REDO}"
    num_in_shard = 0 if record.shard is None else record.shard.num_samples
    if num_in_shard != record.counts.num_written:
        yield f"its record must count {num_in_shard} written samples, got {record.counts.num_written}; {_REDO}"
    if rejects_path(run_dir, stem).is_file():
        try:
            counts = count(read_rejects(rejects_path(run_dir, stem)), num_written=num_in_shard)
        except ArtifactError as error:
            yield str(error)
        else:
            if counts != record.counts:
                yield f"its rejects must add up to the record's counts, got {counts.num_read} samples read; {_REDO}"


def _codes_problems(path: Path, record: LedgerRecord, *, stem: str, manifest: Manifest) -> Iterator[str]:
    """Yield what is wrong inside a shard: keys, shapes, dtype and range of the codes."""
    if not path.is_file() or not index_path(path).is_file():
        return
    network = manifest.fingerprint.network
    shape, dtype = (manifest.num_views, manifest.codes_per_image), np.dtype(codes_dtype(network.codebook_size))
    last_key = ""
    try:
        reader = open_shard(open_storage(str(path.parent)), path.name)
        yield from reader.check_structure()
        for position in range(reader.num_samples):
            sample = reader.sample(position)
            if not sample.key.startswith(stem) or sample.key <= last_key:
                yield f"shard {path}: keys must begin {stem} and ascend, got {sample.key} after {last_key}; {_REDO}"
                return
            last_key = sample.key
            codes_VT = sample.codes_VT
            if codes_VT.shape != shape or codes_VT.dtype != dtype or codes_VT.max() >= network.codebook_size:
                yield f"shard {path}: codes of {sample.key} must be {dtype} {shape} in the codebook; {_REDO}"
                return
    except ArtifactError as error:
        yield str(error)


def _manifest_problems(run_dir: Path, manifest: Manifest, records: list[LedgerRecord]) -> Iterator[str]:
    redo = "rerun the tokenize job to rewrite it"
    shards = [record.shard for record in records if record.shard is not None]
    if shards != manifest.shards:
        yield f"manifest {run_dir}: must list the ledger's {len(shards)} shards, got {len(manifest.shards)}; {redo}"
    totals = add_counts([record.counts for record in records])
    if totals != manifest.totals or manifest.num_samples != totals.num_written:
        yield (
            f"manifest {run_dir}: must count the ledger's {totals.num_written} of {totals.num_read} samples, got "
            f"{manifest.num_samples} of {manifest.totals.num_read}; {redo}"
        )


_REDO = "remove it and rerun the tokenize job to rewrite it"
