"""What of a shard set is finished already, and whether it is the same set at all.

The invariant: work is skipped only after its record was checked against the spec, the input and the files; a set that
was begun with another spec is refused by naming the fields that differ. Cheap on purpose: presence, sizes and
modification times, O(units); contents are read only where a modification time changed.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from pipeline.config import ImageFolderConfig, TokenizeConfig
from pipeline.ledger import LedgerRecord, committed_shard_problem, read_record, record_path, shard_path
from pipeline.local_storage import sha256_of_file, write_json
from pipeline.sources.plan import Plan, Source, WorkUnit
from pipeline.sources.sample import content_digest
from pipeline.storage import ArtifactError
from tokenization.fingerprint import Fingerprint

MAX_NAMED_FIELDS = 8

logger = logging.getLogger(__name__)


def check_identity(run_dir: Path, *, config: TokenizeConfig, plan: Plan, fingerprint: Fingerprint) -> None:
    """Write `plan.json`, or check that it says what this job would write.

    Raises:
        ArtifactError: the directory was begun with another tokenizer, other views or rules, or another plan.
    """
    source = config.source
    identity: dict[str, Any] = {
        "version": 1,
        "fingerprint": fingerprint.model_dump(mode="json"),
        "views": config.views.model_dump(mode="json"),
        "rules": config.rules.model_dump(mode="json"),
        "max_image_pixels": config.max_image_pixels,
        "source_kind": source.kind,
        "samples_per_unit": source.samples_per_unit if isinstance(source, ImageFolderConfig) else None,
        "class_names": None if plan.class_names is None else list(plan.class_names),
        "num_units": len(plan.units),
        "unit_digits": plan.keys.unit_digits,
        "position_digits": plan.keys.position_digits,
    }
    path = run_dir / "plan.json"
    if not path.exists():
        if next((run_dir / "ledger").glob("*.json"), None) is not None:
            raise ArtifactError(f"tokenize {run_dir}: plan.json is missing beside a ledger; use another run_dir")
        write_json(path, identity)
        return
    try:
        begun_with = _flatten(json.loads(path.read_bytes()))
    except ValueError as error:
        raise ArtifactError(f"tokenize {run_dir}: plan.json must be JSON, got {error}; use another run_dir") from error
    now = _flatten(identity)
    differing = [
        f"{name} {begun_with.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(begun_with.keys() | now.keys())
        if begun_with.get(name) != now.get(name)
    ]
    if differing:
        more = f" and {len(differing) - MAX_NAMED_FIELDS} more" if len(differing) > MAX_NAMED_FIELDS else ""
        raise ArtifactError(
            f"tokenize {run_dir}: the job must be the one the directory was begun with, got "
            f"{', '.join(differing[:MAX_NAMED_FIELDS])}{more}; use another run_dir or undo the change"
        )


def find_finished(run_dir: Path, *, source: Source, plan: Plan, fingerprint_digest: str) -> dict[int, LedgerRecord]:
    """Return the records of the units that need no work, by unit index; says in the log why others are done again.

    Raises:
        ArtifactError: a record speaks of another input file or tokenizer than the plan does.
    """
    finished = {}
    for unit in plan.units:
        path = record_path(run_dir, plan.keys.stem(unit.unit_index))
        if not path.exists():
            continue
        try:
            record = read_record(path)
        except ArtifactError as error:
            logger.warning("unit %d is done again: %s", unit.unit_index, error)
            continue
        _check_same_unit(run_dir, unit, record, fingerprint_digest=fingerprint_digest)
        reason = _reason_to_redo(run_dir, unit, record, source=source, stem=path.stem)
        if reason is None:
            finished[unit.unit_index] = record
        else:
            logger.warning("unit %d (%s) is done again: %s", unit.unit_index, unit.name, reason)
    return finished


def _check_same_unit(run_dir: Path, unit: WorkUnit, record: LedgerRecord, *, fingerprint_digest: str) -> None:
    where = f"tokenize {run_dir}: unit {unit.unit_index} was made"
    if record.unit != unit.name:
        raise ArtifactError(f"{where} from {record.unit!r}, got {unit.name!r}; use another run_dir")
    if record.fingerprint_digest != fingerprint_digest:
        raise ArtifactError(
            f"{where} with tokenizer {record.fingerprint_digest}, got {fingerprint_digest}; use another run_dir"
        )


def _reason_to_redo(run_dir: Path, unit: WorkUnit, record: LedgerRecord, *, source: Source, stem: str) -> str | None:
    if record.unit_fingerprint != unit.fingerprint:
        return "a size or name of its input changed"
    if record.input_mark != unit.mark and record.input_sha256 != content_digest(source.read(unit)):
        return "the content of its input changed"
    problem = committed_shard_problem(run_dir, record, stem=stem)
    if problem is not None or record.shard is None:
        return problem
    path = shard_path(run_dir, stem)
    if path.stat().st_mtime_ns != record.shard_mtime_ns and sha256_of_file(path) != record.shard.sha256:
        return f"{path.name} was changed since it was committed"
    return None


def _flatten(value: Any, *, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for name, below in value.items():
        leaves |= _flatten(below, prefix=f"{prefix}.{name}" if prefix else str(name))
    return leaves
