"""The sum over a ledger: totals that balance, and what the manifest will list; O(units), whatever a unit holds.

The invariant: every sample that was read counts once, where it ended. A retried reject is taken out of the rejected of
its old unit and counted by the unit that tried it again.
"""

from __future__ import annotations

from collections import Counter

from pipeline.ledger import LedgerRecord, Retried
from pipeline.rejects import Counts
from pipeline.shards import ShardInfo


class Tally:
    """Adds up the ledger records of a set, each once."""

    def __init__(self) -> None:
        self.shards: dict[int, ShardInfo] = {}
        """The committed shards, by unit index."""
        self.seconds_of_stage: Counter[str] = Counter()
        """Worker seconds spent in each stage, over all units."""
        self._unit_indices: set[int] = set()
        self._num_read = self._num_written = 0
        self._dropped: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._retried: list[Retried] = []

    def __contains__(self, unit_index: int) -> bool:
        return unit_index in self._unit_indices

    @property
    def num_units(self) -> int:
        """Units added so far."""
        return len(self._unit_indices)

    def add(self, record: LedgerRecord) -> None:
        """Add the record of a unit that was not added yet."""
        assert record.unit_index not in self._unit_indices
        self._unit_indices.add(record.unit_index)
        if record.shard is not None:
            self.shards[record.unit_index] = record.shard
        for stage, seconds in record.seconds_of_stage.items():  # a third of the time of Counter.update
            self.seconds_of_stage[stage] += seconds  # type: ignore[assignment]
        counts = record.counts
        self._num_read += counts.num_read
        self._num_written += counts.num_written
        if counts.num_dropped or counts.num_rejected:
            self._dropped.update(counts.dropped_by_reason)
            self._rejected.update(counts.rejected_by_reason)
        if record.retried is not None:
            self._retried.append(record.retried)

    def totals(self) -> Counts:
        """Return where all samples went; reasons are sorted."""
        num_read, rejected = self._num_read, self._rejected.copy()
        for retried in self._retried:
            # A unit that is done again has not rejected them yet.
            if all(int(stem) in self._unit_indices for stem in retried.inputs):
                num_read -= len(retried.keys)
                rejected.subtract(retried.rejected_by_reason)
        return Counts(
            num_read=num_read,
            num_written=self._num_written,
            num_dropped=self._dropped.total(),
            num_rejected=rejected.total(),
            dropped_by_reason=dict(sorted((+self._dropped).items())),
            rejected_by_reason=dict(sorted((+rejected).items())),
        )

    def shards_in_order(self) -> list[ShardInfo]:
        """Return the committed shards in the order of their units."""
        return [self.shards[unit_index] for unit_index in sorted(self.shards)]
