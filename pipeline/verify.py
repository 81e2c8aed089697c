"""Is a shard set what its ledger says? Every byte is read; nothing is changed.

The invariant: a set in which any shard is cut, flipped, missing, extra or swapped, or in which ledger, rejects, poison,
manifest and sidecars do not speak of the same things, has at least one problem. The cost is one read of the shards, in
threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from pipeline.gathered import Ledger
from pipeline.ledger import (
    LedgerRecord,
    Manifest,
    NewerVersionError,
    files_problem,
    index_name,
    poison_name,
    read_manifest,
    record_name,
    rejects_name,
    shard_name,
    stem_of,
)
from pipeline.npy_codes import codes_dtype
from pipeline.rejects import count, read_rejects
from pipeline.shards import REWRITE, ShardReader, action_of_open
from pipeline.sidecars import sidecar_problems
from pipeline.storage import ArtifactError, FileInfo, Storage, sha256_of
from pipeline.tally import Tally

NUM_THREADS = 8


def verify_shard_set(storage: Storage) -> list[str]:
    """Return all that is wrong with a shard set, one line each; nothing if it is whole.

    Of a set that a newer version wrote, only that is told: what its files must be is not known here.
    """
    problems = [f"{storage}: staged leftover {name}; rerun the tokenize job" for name in storage.find_staged()]
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(storage)
    except NewerVersionError as error:
        return [str(error)]
    except ArtifactError as error:
        problems.append(str(error))
    records: dict[str, LedgerRecord] = {}
    damaged: set[str] = set()
    for stem, record in Ledger(storage).records():
        if isinstance(record, NewerVersionError):
            return [str(record)]
        if isinstance(record, ArtifactError):
            problems.append(str(record))
            damaged.add(stem)
        else:
            records[stem] = record
    records = dict(sorted(records.items()))
    files = storage.list("shards/") | storage.list("rejects/")
    poison = {stem_of(name) for name in storage.list("poison/")}
    problems.extend(_stray_files(storage, records, files=[name for name in files if stem_of(name) not in damaged]))
    problems.extend(_gaps(storage, records, poison=poison, damaged=damaged))
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        checks = threads.map(
            lambda stem: list(_unit_problems(storage, stem, records[stem], files=files, manifest=manifest)), records
        )
        problems.extend(problem for of_unit in checks for problem in of_unit)
    if manifest is not None:
        problems.extend(_manifest_problems(storage, manifest, records, poison=poison))
        problems.extend(sidecar_problems(storage, manifest))
    return problems


def _stray_files(storage: Storage, records: Mapping[str, LedgerRecord], *, files: Iterable[str]) -> Iterator[str]:
    """Yield a line for each file that no record speaks of."""
    for name in files:
        record = records.get(stem_of(name))
        expected: set[str] = set()
        if record is not None:
            stem = stem_of(name)
            if record.shard is not None:
                expected |= {shard_name(stem), index_name(stem)}
            if record.counts.num_read > record.counts.num_written:
                expected.add(rejects_name(stem))
        if name not in expected:
            yield f"{storage.url_of(name)}: no ledger record speaks of it; rerun the tokenize job or remove it"


def _gaps(
    storage: Storage, records: Mapping[str, LedgerRecord], *, poison: set[str], damaged: set[str]
) -> Iterator[str]:
    """Yield a line for the first number that neither a record nor poison has, or that a record has wrong."""
    for stem, record in records.items():
        if stem != f"{record.unit_index:0{len(stem)}d}":
            yield f"{storage.url_of(record_name(stem))}: unit_index must be {stem}, got {record.unit_index}; {REWRITE}"
        if stem in poison:
            yield f"{storage.url_of(poison_name(stem))}: unit {stem} has a ledger record too; rerun the tokenize job"
    numbers = sorted({int(stem) for stem in [*records, *poison, *damaged] if stem.isdigit()})
    for before, after in pairwise([-1, *numbers]):
        if after != before + 1:
            yield f"{storage.url_of('ledger')}: unit {before + 1} must come next, got {after}; rerun the tokenize job"
            return


def _unit_problems(
    storage: Storage,
    stem: str,
    record: LedgerRecord,
    *,
    files: Mapping[str, FileInfo],
    manifest: Manifest | None,
) -> Iterator[str]:
    where = f"shard {storage.url_of(shard_name(stem))}"
    problem = files_problem(record, stem=stem, files=files)
    if problem is not None:
        yield f"{where}: {problem}; {REWRITE}"
    num_in_shard = 0 if record.shard is None else record.shard.num_samples
    if num_in_shard != record.counts.num_written:
        num_written = record.counts.num_written
        yield f"{where}: its record must count {num_in_shard} written samples, got {num_written}; {REWRITE}"
    if manifest is not None and record.fingerprint_digest != manifest.fingerprint.digest:
        yield (
            f"ledger record {stem}: fingerprint must be the manifest's {manifest.fingerprint.digest}, got "
            f"{record.fingerprint_digest}; {REWRITE}"
        )
    if rejects_name(stem) in files:
        yield from _reject_problems(storage, stem, record, num_in_shard=num_in_shard)
    if record.shard is not None and {shard_name(stem), index_name(stem)} <= files.keys():
        yield from _shard_problems(storage, stem, record, manifest=manifest)


def _reject_problems(storage: Storage, stem: str, record: LedgerRecord, *, num_in_shard: int) -> Iterator[str]:
    try:
        counts = count(read_rejects(storage, rejects_name(stem)), num_written=num_in_shard)
    except ArtifactError as error:
        yield str(error)
        return
    if counts != record.counts:
        yield (
            f"{storage.url_of(rejects_name(stem))}: its rejects must add up to the record's counts, got "
            f"{counts.num_read} samples read; {REWRITE}"
        )


def _shard_problems(storage: Storage, stem: str, record: LedgerRecord, *, manifest: Manifest | None) -> Iterator[str]:
    """Yield what is wrong with a shard's bytes: checksum, structure, keys, shapes and range of the codes."""
    assert record.shard is not None
    where = f"shard {storage.url_of(shard_name(stem))}"
    try:
        data, index = storage.map(shard_name(stem)), storage.read_bytes(index_name(stem))
    except OSError as error:
        yield f"{where}: must be readable, got {error}; {action_of_open(error)}"
        return
    sha256 = sha256_of(data)
    if sha256 != record.shard.sha256:
        want = record.shard.sha256[:8]
        yield f"{where}: sha256 differs from its ledger record (want {want}.., got {sha256[:8]}..); {REWRITE}"
    try:
        reader = ShardReader(data, index=index, where=storage.url_of(shard_name(stem)))
    except ArtifactError as error:
        yield str(error)
        return
    problems = reader.check_structure()
    yield from problems
    if not problems and manifest is not None:
        yield from _sample_problems(reader, stem=stem, manifest=manifest)


def _sample_problems(reader: ShardReader, *, stem: str, manifest: Manifest) -> Iterator[str]:
    """Yield what is wrong with the first sample whose key, or shape, dtype or range of codes is."""
    codebook_size = manifest.fingerprint.network.codebook_size
    shape, dtype = (manifest.num_views, manifest.codes_per_image), np.dtype(codes_dtype(codebook_size))
    last_key = ""
    for position in range(reader.num_samples):
        try:
            sample = reader.sample(position)
        except ArtifactError as error:
            yield str(error)
            return
        if not sample.key.startswith(stem) or sample.key <= last_key:
            rule = f"keys must begin {stem} and ascend, got {sample.key} after {last_key}"
            yield f"shard {reader.where}: {rule}; {REWRITE}"
            return
        codes_VT, last_key = sample.codes_VT, sample.key
        if codes_VT.shape != shape or codes_VT.dtype != dtype or codes_VT.max() >= codebook_size:
            yield f"shard {reader.where}: codes of {sample.key} must be {dtype} {shape} in the codebook; {REWRITE}"
            return


def _manifest_problems(
    storage: Storage, manifest: Manifest, records: Mapping[str, LedgerRecord], *, poison: set[str]
) -> Iterator[str]:
    redo = "rerun the tokenize job to rewrite it"
    tally = Tally()
    for record in records.values():
        if record.unit_index not in tally:
            tally.add(record)
    shards = tally.shards_in_order()
    if shards != manifest.shards:
        yield f"manifest {storage}: must list the ledger's {len(shards)} shards, got {len(manifest.shards)}; {redo}"
    if sorted(int(stem) for stem in poison if stem.isdigit()) != manifest.poison_units:
        yield f"manifest {storage}: must name the units in poison/, got {manifest.poison_units}; {redo}"
    totals = tally.totals()
    if totals != manifest.totals or manifest.num_samples != totals.num_written:
        yield (
            f"manifest {storage}: must count the ledger's {totals.num_written} of {totals.num_read} samples, got "
            f"{manifest.num_samples} of {manifest.totals.num_read}; {redo}"
        )
