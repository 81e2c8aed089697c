"""Trying rejected samples again: appended work units that read only them, from wherever they lie in the input.

The invariant: an appended unit is planned in `retries/NNNNN.json` before any work, so that a killed retry is resumed by
any later run; a reject is retried once, under a new key, and what happens to it counts in the appended unit alone.
Dropped samples (stage `rule`) are no rejects. Reading costs a pass over every input that holds a reject.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

from pydantic import NonNegativeInt, PositiveInt, ValidationError

from pipeline.config import TokenizeConfig
from pipeline.ledger import stem_of
from pipeline.prepare import prepare_sample
from pipeline.rejects import RULE_STAGE, Reject, read_rejects
from pipeline.sources.fields import printable
from pipeline.sources.image_folder import FolderFiles
from pipeline.sources.parquet import RowGroups
from pipeline.sources.plan import KeyFormat, Plan, Source, WorkUnit
from pipeline.sources.sample import READ_STAGE, InputSample, Problem
from pipeline.storage import ArtifactError, Storage, next_action
from pipeline.tally import Tally
from tokenization.config import Config
from tokenization.messages import reason_of

MAX_SAMPLES_PER_UNIT = 10_000
MAX_INPUTS_PER_UNIT = 100
"""Work units of the source that an appended one reads, one after the other: so that all workers have some."""
NUM_READ_THREADS = 16
_FOLDER = "retries/"


class PlannedRetry(Config):
    """One appended unit: `retries/NNNNN.json`."""

    version: Literal[1] = 1
    """Version of this format."""
    unit_index: NonNegativeInt
    """Number of the appended unit."""
    keys: list[str]
    """Keys of the rejects to try again, in the order of the input."""
    sources: list[str] | None = None
    """The input's own name of each, by which it is found where it has moved; sets of before have none."""
    rejected_by_reason: dict[str, int]
    """Why they were rejected, by `stage/reason`."""
    max_image_pixels: PositiveInt
    """The job's limit when the retry was asked for; raising it is one reason to retry."""

    def rejects(self) -> Iterator[tuple[str, str | None]]:
        """Yield the key of each reject and the input's name of it."""
        sources: Sequence[str | None] = self.sources or [None] * len(self.keys)
        return zip(self.keys, sources, strict=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryDetails:
    """What an appended unit reads.

    Attributes:
        planned: the keys, and why they were rejected.
        picks: for each work unit of the source, in order, what to read of it, positions ascending.
    """

    planned: PlannedRetry
    picks: tuple[tuple[WorkUnit, tuple[Pick, ...]], ...]


class Pick(NamedTuple):
    """One reject in its input: where it was, and what the input called it (None: not known)."""

    position: int
    source: str | None


class RetrySource:
    """Reads the units of a source, and the units that were appended to them."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def read(self, unit: WorkUnit) -> Iterator[InputSample]:
        """Yield the samples of a unit; those of an appended one are numbered anew from 0.

        Raises:
            ArtifactError: an input is damaged as a whole.
        """
        if not isinstance(unit.details, RetryDetails):
            yield from self._source.read(unit)
            return
        position = 0
        for input_unit, picks in unit.details.picks:
            for sample in find_picks(self._source.read(input_unit), picks, unit_name=input_unit.name):
                yield replace(sample, position=position)
                position += 1


def find_picks(samples: Iterable[InputSample], picks: Sequence[Pick], *, unit_name: str) -> Iterator[InputSample]:
    """Yield a sample for each pick, in order: the one of its name, at its old position if there are several.

    Args:
        samples: of the unit; read no further than needed.
        picks: at least one, positions ascending.
        unit_name: for the problem of a sample that is not there any more.
    """
    next_pick = 0
    in_place, moved = dict[Pick, InputSample](), dict[str, InputSample]()
    names = {pick.source for pick in picks}
    for sample in samples:
        if sample.position == picks[next_pick].position and picks[next_pick].source in (sample.source, None):
            yield sample
            next_pick += 1
            if next_pick == len(picks):
                return
        elif sample.source in names:  # behind one that has moved: kept until all of the unit is read
            in_place[Pick(sample.position, sample.source)] = sample
            moved.setdefault(sample.source, sample)
    for position, source in picks[next_pick:]:
        found = None
        if source is not None:
            found = in_place.get(Pick(position, source), moved.get(source))
        if found is None:
            name = f"{unit_name}#{position}" if source is None else source
            detail = f"{unit_name} has no sample {position if source is None else source} any more"
            problem = Problem(stage=READ_STAGE, reason="gone", detail=detail)
            found = InputSample(position=position, source=name, extra={}, problem=problem)
        yield found


def with_retries(storage: Storage, plan: Plan) -> Plan:
    """Return the plan of a source with the appended units of this set after its own.

    Raises:
        ArtifactError: a file in `retries/` is damaged or missing.
    """
    names = sorted(storage.list(_FOLDER), key=lambda name: int(stem_of(name)))
    planned = [_read_planned(storage, name) for name in names]
    for unit_index, one in enumerate(planned, start=len(plan.units)):
        if one.unit_index != unit_index:
            raise ArtifactError(
                f"tokenize {storage}: retries/ must go on at unit {unit_index}, got {one.unit_index}; "
                "put the missing file back or use another run_dir"
            )
    return append_units(plan, planned)


def append_units(plan: Plan, planned: Iterable[PlannedRetry]) -> Plan:
    """Return a plan with these units after its own; pure."""
    units = [*plan.units]
    for one in planned:
        units.append(_appended_unit(one, plan=replace(plan, units=tuple(units))))
    return replace(plan, units=tuple(units))


def plan_retries(storage: Storage, plan: Plan, *, max_image_pixels: int) -> list[PlannedRetry]:
    """Return the units to append for all rejects that were not retried yet; nothing is written.

    Args:
        storage: of the set.
        plan: all its units, those appended before included.
        max_image_pixels: for the new units.

    Raises:
        ArtifactError: a rejects file is damaged.
    """
    retried = {
        key for unit in plan.units if isinstance(unit.details, RetryDetails) for key in unit.details.planned.keys
    }
    to_retry = (
        reject
        for reject in _rejects_in_order(storage, num_units=len(plan.units))
        if reject.stage != RULE_STAGE and reject.key not in retried
    )
    return [
        _planned(rejects, unit_index=unit_index, max_image_pixels=max_image_pixels)
        for unit_index, rejects in enumerate(_grouped(to_retry, plan=plan), start=len(plan.units))
    ]


def write_planned(storage: Storage, planned: Iterable[PlannedRetry], *, keys: KeyFormat) -> None:
    """Commit the plan of appended units; from now on any run does them."""
    for one in planned:
        storage.write_json(f"{_FOLDER}{keys.stem(one.unit_index)}.json", one.model_dump(mode="json"))


def names_in_plan(unit: WorkUnit) -> frozenset[str] | None:
    """Return the names of the samples that a unit would read, by its plan alone; None where only reading tells them.

    Only units of a folder, and of one table, can come to hold each other's samples; all others are whole files.
    """
    if isinstance(unit.details, FolderFiles):
        names = zlib.decompress(unit.details.packed_names).decode("utf-8", "surrogateescape").split("\0")
        return frozenset(map(printable, names))
    if isinstance(unit.details, RowGroups):
        table, start = unit.details.name.rpartition("/")[2], unit.details.first_row
        return frozenset(f"{printable(table)}#{row}" for row in range(start, start + unit.details.num_rows))
    return None


def _grouped(rejects: Iterable[Reject], *, plan: Plan) -> Iterator[list[Reject]]:
    """Yield the rejects of each appended unit, in the order of the input: not too many, from not too many inputs."""
    size = min(MAX_SAMPLES_PER_UNIT, 10**plan.keys.position_digits)
    group: list[Reject] = []
    inputs: set[int] = set()
    for reject in rejects:
        input_index, _ = _locate(reject.key, plan=plan)
        if len(group) == size or len(inputs | {input_index}) > MAX_INPUTS_PER_UNIT:
            yield sorted(group, key=lambda one: _locate(one.key, plan=plan))
            group, inputs = [], set()
        group.append(reject)
        inputs.add(input_index)
    if group:
        yield sorted(group, key=lambda one: _locate(one.key, plan=plan))


def _rejects_in_order(storage: Storage, *, num_units: int) -> Iterator[Reject]:
    """Yield what each unit rejected or dropped, unit by unit; a few files are read ahead."""
    names = [name for name in storage.list("rejects/") if int(stem_of(name)) < num_units]
    names.sort(key=lambda name: int(stem_of(name)))
    with ThreadPoolExecutor(NUM_READ_THREADS) as threads:
        for start in range(0, len(names), NUM_READ_THREADS):
            for rejects in threads.map(partial(read_rejects, storage), names[start : start + NUM_READ_THREADS]):
                yield from rejects


def retried_picks(plan: Plan, *, tally: Tally) -> dict[int, list[Pick]]:
    """Return what appended units try again of units that the tally lacks, by the unit that rejected it."""
    picks_of: dict[int, list[Pick]] = {}
    for unit in plan.units:
        if isinstance(unit.details, RetryDetails):
            for key, source in unit.details.planned.rejects():
                unit_index, position = plan.keys.split(key)
                if unit_index not in tally:
                    picks_of.setdefault(unit_index, []).append(Pick(position, source))
    return picks_of


def first_usable(unit: WorkUnit, picks: Iterable[Pick], *, source: RetrySource, config: TokenizeConfig) -> int | None:
    """Return the position of a reject that would not be rejected again, or None; reads the unit, decodes only those.

    Raises:
        ArtifactError: the input is damaged as a whole.
    """
    source_at = dict(picks)
    for sample in source.read(unit):
        if sample.position not in source_at:
            continue
        if source_at.pop(sample.position) not in (sample.source, None):
            return sample.position  # another sample lies there now
        limit = max_image_pixels_of(unit, config=config)
        prepared = prepare_sample(sample, key="", config=config, max_image_pixels=limit)
        if not isinstance(prepared, Reject) or prepared.stage == RULE_STAGE:
            return sample.position
        if not source_at:
            break
    return next(iter(source_at), None)


def max_image_pixels_of(unit: WorkUnit, *, config: TokenizeConfig) -> int:
    """Return the limit that a unit is decoded with."""
    return unit.details.planned.max_image_pixels if isinstance(unit.details, RetryDetails) else config.max_image_pixels


def _planned(rejects: list[Reject], *, unit_index: int, max_image_pixels: int) -> PlannedRetry:
    reasons = Counter(f"{reject.stage}/{reject.reason}" for reject in rejects)
    return PlannedRetry(
        unit_index=unit_index,
        keys=[reject.key for reject in rejects],
        sources=[reject.source for reject in rejects],
        rejected_by_reason=dict(sorted(reasons.items())),
        max_image_pixels=max_image_pixels,
    )


def _read_planned(storage: Storage, name: str) -> PlannedRetry:
    try:
        return PlannedRetry.model_validate_json(storage.read_bytes(name))
    except (OSError, ValidationError) as error:
        doing, action = (
            f"read {storage.url_of(name)}",
            next_action(error, otherwise="put it back or use another run_dir"),
        )
        raise ArtifactError(f"{doing}: {reason_of(error)}; {action}") from error


def _appended_unit(planned: PlannedRetry, *, plan: Plan) -> WorkUnit:
    picks_of: dict[int, list[Pick]] = {}
    for key, source in planned.rejects():
        unit_index, position = _locate(key, plan=plan)
        picks_of.setdefault(unit_index, []).append(Pick(position, source))
    picks = tuple((plan.units[unit_index], tuple(picks)) for unit_index, picks in picks_of.items())
    return WorkUnit(
        unit_index=planned.unit_index,
        name=f"{len(planned.keys)} rejects",
        fingerprint=hashlib.sha256(" ".join(planned.keys).encode()).hexdigest()[:16],
        mark=" ".join(of_input.mark for of_input, _ in picks),
        details=RetryDetails(planned=planned, picks=picks),
    )


def _locate(key: str, *, plan: Plan) -> tuple[int, int]:
    """Return the unit of the source, and the position in it, of the sample behind a key, retried or not."""
    unit_index, position = plan.keys.split(key)
    details = plan.units[unit_index].details
    if isinstance(details, RetryDetails):
        return _locate(details.planned.keys[position], plan=plan)
    return unit_index, position
