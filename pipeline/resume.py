"""What of a shard set is finished already, and whether it is the same set at all.

The invariant: work is skipped only after its record was checked against the spec, the input and the files; a set that
was begun with another spec is refused by naming the fields that differ. Cheap on purpose: three listings, sizes and
marks, O(units); contents are read only where a mark changed, as after a move, and the record then takes the new one.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import TokenizeConfig
from pipeline.gathered import Ledger
from pipeline.ledger import (
    LedgerRecord,
    NewerVersionError,
    files_problem,
    index_name,
    rejects_name,
    shard_name,
    stem_of,
    write_record,
)
from pipeline.retried_inputs import (
    RetriedInput,
    check_names,
    check_rejected_again,
    check_sizes,
    inputs_to_retry,
    is_as_retried,
    retried_inputs,
)
from pipeline.retry import RetrySource
from pipeline.sources.plan import KeyFormat, Plan, WorkUnit
from pipeline.sources.sample import content_digest
from pipeline.storage import ArtifactError, FileInfo, Storage, sha256_of
from pipeline.tally import Tally
from tokenization.fingerprint import Fingerprint
from tokenization.messages import named

MAX_NAMED_FIELDS = 8
PLAN_NAME = "plan.json"
PLACE_FIELDS = frozenset({"urls", "urls_file", "root", "class_names"})
"""Fields of sources that say where a corpus lies, which may change; all other fields are part of the identity."""

logger = logging.getLogger(__name__)


def with_begun_keys(storage: Storage, plan: Plan) -> Plan:
    """Return a plan with the key widths that the set was begun with: an input that has grown since asks for no others.

    A set that was not begun, or whose `plan.json` is damaged, leaves the plan as it is.
    """
    try:
        begun_with = json.loads(storage.read_bytes(PLAN_NAME))
        keys = KeyFormat(unit_digits=int(begun_with["unit_digits"]), position_digits=int(begun_with["position_digits"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return plan
    return replace(plan, keys=keys)


def check_identity(
    storage: Storage,
    *,
    config: TokenizeConfig,
    plan: Plan,
    fingerprint: Fingerprint,
    free: Collection[str] = (),
) -> dict[str, Any]:
    """Write `plan.json`, or check that it says what this job would write; returns what it says.

    Args:
        storage: of the set.
        config: the job.
        plan: of the source alone, its keys as wide as those of the set.
        fingerprint: of the tokenizer.
        free: fields of the identity that may differ.

    Raises:
        ArtifactError: the directory was begun with another tokenizer, other views or rules, or another plan.
    """
    now = _identity(config, plan=plan, fingerprint=fingerprint)
    try:
        begun_with = json.loads(storage.read_bytes(PLAN_NAME))
    except FileNotFoundError:
        if storage.list("ledger/"):
            raise ArtifactError(
                f"tokenize {storage}: plan.json is missing beside a ledger; use another run_dir"
            ) from None
        storage.write_json(PLAN_NAME, now)
        return now
    except ValueError as error:
        raise ArtifactError(f"tokenize {storage}: plan.json must be JSON, got {error}; use another run_dir") from error
    differing = [text for name, text in _differences(begun_with, now) if name not in free]
    if differing:
        raise ArtifactError(
            f"tokenize {storage}: the job must be the one the directory was begun with, got "
            f"{named(differing, most=MAX_NAMED_FIELDS)}; use another run_dir or undo the change"
        )
    return {**begun_with}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a set holds at the start of a run."""

    tally: Tally
    """Of the units that need no work."""
    uncommitted: tuple[str, ...]
    """Shards, indices and rejects of other units: left by killed runs, or about to be replaced."""


def find_finished(
    storage: Storage,
    *,
    config: TokenizeConfig,
    plan: Plan,
    source: RetrySource,
    fingerprint_digest: str,
    ledger: Ledger,
) -> Found:
    """Return what needs no work; says in the log why other units are done again.

    The records of units that are done again are removed, so that no record ever vouches for what is being replaced.

    Args:
        storage: of the set.
        config: the job.
        plan: the units of the source and, after them, those that `retry-rejects` appended.
        source: reads the units; only those whose input may have changed.
        fingerprint_digest: of the tokenizer.
        ledger: of the set, not read yet.

    Raises:
        ArtifactError: a record speaks of another input file or tokenizer than the plan does; a unit must be done again
            that would now write samples which `retry-rejects` has written; or a unit whose rejects are about to be
            retried would now hold other samples. Nothing is removed then.
        NewerVersionError: a newer tensorar wrote a record; nothing is removed.
    """
    search = _Search(storage, plan=plan, ledger=ledger)
    doubtful = search.sort_records(fingerprint_digest=fingerprint_digest)
    to_retry = inputs_to_retry(plan, tally=search.tally)
    for record in sorted(doubtful, key=lambda record: record.unit_index):
        search.judge(record, source=source, is_to_retry=record.unit_index in to_retry)
    tally, redone = search.tally, search.redone
    check_rejected_again(storage, plan=plan, tally=tally, source=source, config=config, reasons=redone)
    for stem, reason in redone.items():
        logger.warning("unit %d (%s) is done again: %s", int(stem), plan.units[int(stem)].name, reason)
        ledger.forget(stem)
    if search.num_renewed:
        logger.info("tokenize %s: units_moved_or_touched=%d, their contents are the same", storage, search.num_renewed)
        ledger.gather()
    return Found(tally=tally, uncommitted=tuple(name for name in search.files if not _is_of_tally(name, tally)))


class _Search:
    """A look through the records of a set: which units need no work, and why others are done again."""

    def __init__(self, storage: Storage, *, plan: Plan, ledger: Ledger) -> None:
        self._storage, self._plan, self._ledger = storage, plan, ledger
        self._retried_from: defaultdict[str, set[RetriedInput]] = defaultdict(set)
        self.files = storage.list("shards/")
        self.files.update(storage.list("rejects/"))
        self.tally = Tally()
        self.redone: dict[str, str] = {}
        """Why a unit is done again, by its digits."""
        self.num_renewed = 0

    def sort_records(self, *, fingerprint_digest: str) -> list[LedgerRecord]:
        """Keep the units whose files and input are as their record says; return those whose input is in doubt."""
        doubtful: list[LedgerRecord] = []
        for stem, record in self._ledger.records():
            if isinstance(record, NewerVersionError):
                raise record
            if isinstance(record, ArtifactError):
                self.redone[_stem_in_plan(self._storage, stem, plan=self._plan)] = f"ledger/{stem}.json is damaged"
                logger.warning("%s", record)
                continue
            unit = _unit_of(self._storage, record, plan=self._plan, stem=stem, fingerprint_digest=fingerprint_digest)
            if record.retried is not None:
                for input_stem, seen in retried_inputs(record, record.retried):
                    self._retried_from[input_stem].add(seen)
                unit = replace(unit, mark=record.input_mark)  # its input is that of other units, which are looked at
            reason = _file_reason(self._storage, record, stem=stem, files=self.files)
            if reason is not None:
                self.redone[stem] = reason
            elif _is_same_input(unit, record):
                self._renew(record, stem=stem, unit=unit)
                self._keep(record, stem=stem)
            else:
                doubtful.append(record)
        return doubtful

    def judge(self, record: LedgerRecord, *, source: RetrySource, is_to_retry: bool) -> None:
        """Keep a unit whose input is in doubt, or have it done again; called once all records were sorted."""
        unit, stem = self._plan.units[record.unit_index], self._plan.keys.stem(record.unit_index)
        when_retried = self._retried_from.get(stem, set())
        if is_to_retry or is_as_retried(unit, when_retried):
            # Its input was mended for `retry-rejects`, which reads what became of its rejects.
            if is_to_retry and unit.fingerprint != record.unit_fingerprint:
                check_names(self._storage, record, stem=stem, unit=unit)
            self._keep(record, stem=stem)
            return
        reason = _input_reason(unit, record, source=source)
        if reason is None:
            self._renew(record, stem=stem, unit=unit)
        elif when_retried:
            check_sizes(self._storage, unit, reason=reason, when_retried=when_retried)
        else:
            self.redone[stem] = reason
            return
        self._keep(record, stem=stem)

    def _keep(self, record: LedgerRecord, *, stem: str) -> None:
        """Count a record, and let go of its files, which in a large set take as much memory as the tally."""
        self.tally.add(record)
        for name in (shard_name(stem), index_name(stem), rejects_name(stem)):
            self.files.pop(name, None)

    def _renew(self, record: LedgerRecord, *, stem: str, unit: WorkUnit) -> None:
        """Commit a record with the marks that its input and its shard have now, where they are others.

        Else a set or a corpus that was moved would be read whole at the start of every run.
        """
        shard_mark = "" if record.shard is None else self.files[shard_name(stem)].mark
        if (record.input_mark, record.shard_mark) == (unit.mark, shard_mark):
            return
        renewed = record.model_copy(update={"input_mark": unit.mark, "shard_mark": shard_mark})
        self._ledger.note(stem, renewed, mark=write_record(self._storage, stem, renewed).mark)
        self.num_renewed += 1


def _is_of_tally(name: str, tally: Tally) -> bool:
    stem = stem_of(name)
    return stem.isdigit() and int(stem) in tally


def _stem_in_plan(storage: Storage, stem: str, *, plan: Plan) -> str:
    if not stem.isdigit() or int(stem) >= len(plan.units) or plan.keys.stem(int(stem)) != stem:
        raise ArtifactError(f"tokenize {storage}: ledger/{stem}.json is of no unit of the plan; use another run_dir")
    return stem


def _unit_of(storage: Storage, record: LedgerRecord, *, plan: Plan, stem: str, fingerprint_digest: str) -> WorkUnit:
    where = f"tokenize {storage}: unit {record.unit_index}"
    if plan.keys.stem(record.unit_index) != _stem_in_plan(storage, stem, plan=plan):
        raise ArtifactError(f"{where} of {stem}.json is not in the plan; use another run_dir")
    unit = plan.units[record.unit_index]
    if record.unit != unit.name:
        raise ArtifactError(f"{where} was made from {record.unit!r}, got {unit.name!r}; use another run_dir")
    if record.fingerprint_digest != fingerprint_digest:
        raise ArtifactError(
            f"{where} was made with tokenizer {record.fingerprint_digest}, got {fingerprint_digest}; "
            "use another run_dir"
        )
    return unit


def _file_reason(storage: Storage, record: LedgerRecord, *, stem: str, files: Mapping[str, FileInfo]) -> str | None:
    """Return why what a record speaks of is not there any more, or None."""
    problem = files_problem(record, stem=stem, files=files)
    if problem is not None or record.shard is None:
        return problem
    name = shard_name(stem)
    if files[name].mark != record.shard_mark and sha256_of(storage.map(name)) != record.shard.sha256:
        return f"{record.shard.name} was changed since it was committed"
    return None


def _is_same_input(unit: WorkUnit, record: LedgerRecord) -> bool:
    return record.unit_fingerprint == unit.fingerprint and record.input_mark == unit.mark


def _input_reason(unit: WorkUnit, record: LedgerRecord, *, source: RetrySource) -> str | None:
    """Return how the input of a unit differs from what was read, or None if it was only touched."""
    if record.unit_fingerprint != unit.fingerprint:
        return "a size or name of its input changed"
    if record.input_sha256 != content_digest(source.read(unit)):
        return "the content of its input changed"
    return None


def _identity(config: TokenizeConfig, *, plan: Plan, fingerprint: Fingerprint) -> dict[str, Any]:
    source = config.source.model_dump(mode="json", exclude=set(PLACE_FIELDS))
    return {
        "version": 1,
        "fingerprint": fingerprint.model_dump(mode="json"),
        "views": config.views.model_dump(mode="json"),
        "rules": config.rules.model_dump(mode="json"),
        "max_image_pixels": config.max_image_pixels,
        "source": source,
        "class_names": None if plan.class_names is None else list(plan.class_names),
        "num_units": len(plan.units),
        "unit_digits": plan.keys.unit_digits,
        "position_digits": plan.keys.position_digits,
    }


def _differences(begun_with: Any, now: Any) -> list[tuple[str, str]]:
    before, after = _flatten(begun_with), _flatten(now)
    return [
        (name, f"{name} {before.get(name)!r} -> {after.get(name)!r}")
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _flatten(value: Any, *, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for name, below in value.items():
        leaves |= _flatten(below, prefix=f"{prefix}.{name}" if prefix else str(name))
    return leaves
