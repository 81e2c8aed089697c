"""Samples that were dropped or rejected, and the counts that must balance.

The invariant: read = written + dropped + rejected, each dropped or rejected sample being a line of
`rejects/NNNNN.parquet` under the key that it would have had, so that it can be found and tried again alone.
"""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import NonNegativeInt, ValidationError, model_validator

from pipeline.storage import ArtifactError, Storage, next_action
from tokenization.config import Config
from tokenization.messages import reason_of

RULE_STAGE = "rule"
"""The stage of samples that were dropped on purpose; every other stage means rejected."""
REJECTS_SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "source", "stage", "reason", "detail")])


class Counts(Config):
    """Where the samples of a unit, or of a set, went."""

    num_read: NonNegativeInt
    """Samples found in the input."""
    num_written: NonNegativeInt
    """Samples in shards."""
    num_dropped: NonNegativeInt
    """Samples removed by a rule."""
    num_rejected: NonNegativeInt
    """Samples that failed."""
    dropped_by_reason: dict[str, int]
    """Dropped samples of each rule."""
    rejected_by_reason: dict[str, int]
    """Rejected samples of each `stage/reason`."""

    @model_validator(mode="after")
    def _check_balance(self) -> Counts:
        known = self.num_written + self.num_dropped + self.num_rejected
        if self.num_read != known:
            raise ValueError(f"read must be written + dropped + rejected = {known}, got {self.num_read}")
        if self.num_dropped != sum(self.dropped_by_reason.values()):
            raise ValueError(f"reasons must add up to num_dropped, got {self.dropped_by_reason}")
        if self.num_rejected != sum(self.rejected_by_reason.values()):
            raise ValueError(f"reasons must add up to num_rejected, got {self.rejected_by_reason}")
        return self


class Reject(Config):
    """One dropped or rejected sample: a line of `rejects/NNNNN.parquet`."""

    key: str
    """The key that the sample would have had."""
    source: str
    """Its name in the input."""
    stage: str
    """`read`, `decode`, `crop`, or `rule` for dropped samples."""
    reason: str
    """Short, to count by."""
    detail: str
    """For a person."""


def write_rejects(storage: Storage, name: str, rejects: list[Reject]) -> None:
    """Commit the dropped and rejected samples of a unit as parquet."""
    table = pa.Table.from_pylist([reject.model_dump() for reject in rejects], schema=REJECTS_SCHEMA)
    with storage.stage(name) as staged_path:
        pq.write_table(table, staged_path)


def read_rejects(storage: Storage, name: str) -> list[Reject]:
    """Return the dropped and rejected samples of a unit.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    try:
        with storage.open(name) as file:
            return [Reject(**line) for line in pq.ParquetFile(file).read().to_pylist()]
    except (OSError, pa.ArrowException, ValidationError, TypeError) as error:
        doing, action = f"read {storage.url_of(name)}", next_action(error, otherwise="rerun the tokenize job")
        raise ArtifactError(f"{doing}: must be a rejects table, got {reason_of(error)}; {action}") from error


def count(rejects: list[Reject], *, num_written: int) -> Counts:
    """Return the counts of a unit from its rejects and the number of samples in its shard.

    `num_read` is their sum: whoever has read the input compares it with that.
    """
    dropped = Counter(reject.reason for reject in rejects if reject.stage == RULE_STAGE)
    rejected = Counter(f"{reject.stage}/{reject.reason}" for reject in rejects if reject.stage != RULE_STAGE)
    return Counts(
        num_read=num_written + len(rejects),
        num_written=num_written,
        num_dropped=dropped.total(),
        num_rejected=rejected.total(),
        dropped_by_reason=dict(sorted(dropped.items())),
        rejected_by_reason=dict(sorted(rejected.items())),
    )
