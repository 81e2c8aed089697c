"""Units whose rejects were tried again: may they stay as they are, although their input was mended since?

The invariant: no sample is in a set twice, and none is hidden. An appended unit has read the mended input of another
unit, whose record still speaks of the old one; such a unit is kept while the rest of it is as it was, as far as names,
sizes and marks tell, and never done again where it would write what the appended unit has written.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from pipeline.config import TokenizeConfig
from pipeline.ledger import LedgerRecord, Retried, rejects_name, shard_name
from pipeline.rejects import read_rejects
from pipeline.retry import RetryDetails, RetrySource, first_usable, names_in_plan, retried_picks
from pipeline.shards import read_shard
from pipeline.sources.plan import Plan, WorkUnit
from pipeline.storage import ArtifactError, Storage
from pipeline.tally import Tally
from tokenization.messages import named

MAX_NAMED_SAMPLES = 3

logger = logging.getLogger(__name__)


class RetriedInput(NamedTuple):
    """The input of a unit as an appended unit read it; mark None where the record does not say."""

    fingerprint: str
    mark: str | None


def inputs_to_retry(plan: Plan, *, tally: Tally) -> set[int]:
    """Return the units whose rejects are about to be tried again."""
    appended = [unit for unit in plan.units if isinstance(unit.details, RetryDetails) and unit.unit_index not in tally]
    return {of_input.unit_index for unit in appended for of_input, _ in unit.details.picks}


def retried_inputs(record: LedgerRecord, retried: Retried) -> Iterator[tuple[str, RetriedInput]]:
    """Yield each input of an appended unit as it read it, by the digits of the input's own unit."""
    marks = dict(zip(retried.inputs, record.input_mark.split(), strict=False))  # records of before have none
    for stem, fingerprint in retried.inputs.items():
        yield stem, RetriedInput(fingerprint, marks.get(stem))


def is_as_retried(unit: WorkUnit, when_retried: Collection[RetriedInput]) -> bool:
    """Return whether the input of a unit is what an appended unit has read, as far as a listing tells."""
    return any(seen.fingerprint == unit.fingerprint and seen.mark in (unit.mark, None) for seen in when_retried)


def check_sizes(storage: Storage, unit: WorkUnit, *, reason: str, when_retried: Collection[RetriedInput]) -> None:
    """Raise ArtifactError if the input of a unit has other names or sizes than when its rejects were retried.

    Of an input that was mended no record holds the contents, so more than a warning cannot be had of them.
    """
    if unit.fingerprint in {seen.fingerprint for seen in when_retried}:
        logger.warning(
            "unit %d (%s) is kept: its input was written again after its rejects were retried, and only names and "
            "sizes are known to be the same; if contents changed, use another run_dir",
            unit.unit_index,
            unit.name,
        )
        return
    raise ArtifactError(
        f"tokenize {storage}: {reason} in unit {unit.unit_index} ({unit.name}) after its rejects were retried; run "
        "tensorar retry-rejects if more of them were mended, or undo the change, or use another run_dir"
    )


def check_names(storage: Storage, record: LedgerRecord, *, stem: str, unit: WorkUnit) -> None:
    """Raise ArtifactError if a unit that is kept would now read a sample that it has not read, and no unit would."""
    names = names_in_plan(unit)
    if names is None:
        return
    known = set[str]()
    if record.shard is not None:
        known.update(sample.metadata["source"] for sample in read_shard(storage, shard_name(stem)))
    if record.counts.num_read > record.counts.num_written:
        known.update(reject.source for reject in read_rejects(storage, rejects_name(stem)))
    if names != known:
        found, lost = (named(sorted(some), most=MAX_NAMED_SAMPLES) for some in (names - known, known - names))
        raise ArtifactError(
            f"retry rejects of {storage}: unit {unit.unit_index} ({unit.name}) must hold the samples that it was made "
            f"from, got {found} in place of {lost}; put mended files back under their old names, rows into their old "
            "row groups, or use another run_dir"
        )


def check_rejected_again(
    storage: Storage,
    *,
    plan: Plan,
    tally: Tally,
    source: RetrySource,
    config: TokenizeConfig,
    reasons: Mapping[str, str],
) -> None:
    """Raise ArtifactError if a unit that is done again would write a sample that an appended unit writes too."""
    for unit_index, picks in retried_picks(plan, tally=tally).items():
        unit, stem = plan.units[unit_index], plan.keys.stem(unit_index)
        usable = first_usable(unit, picks, source=source, config=config)
        if usable is not None:
            reason, key = reasons.get(stem, f"ledger/{stem}.json is missing"), plan.keys.key(unit_index, usable)
            raise ArtifactError(
                f"tokenize {storage}: {reason} in unit {unit_index} ({unit.name}), whose input was mended for its "
                f"rejects to be retried: done again, it would write sample {key} a second time; put the file back from "
                "a copy, or use another run_dir"
            )
