"""What a source is: `plan()` cuts a corpus into work units without reading a pixel, `read(unit)` yields its samples.

The invariant: the same files give the same plan and the same samples in the same order, on any machine; shard i of the
output is work unit i of the plan. A moved corpus keeps its fingerprints, a changed file changes its unit's. A plan is
held whole and sent to workers unit by unit, so `details` stays small.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any

from pipeline.sources.sample import InputSample
from pipeline.storage import ArtifactError, FileInfo

MIN_UNIT_DIGITS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkUnit:
    """What one worker call does and one shard holds.

    Attributes:
        unit_index: its number, and that of its shard.
        name: what a person calls it.
        fingerprint: 16 hex digits over the names and sizes of its files.
        mark: 16 hex digits over the marks (modification time, ETag) of its files when it was planned; unchanged means
            that none was written again.
        details: what its source needs to read it; picklable.
    """

    unit_index: int
    name: str
    fingerprint: str
    mark: str
    details: Any


@dataclass(frozen=True, kw_only=True)
class KeyFormat:
    """How wide the keys and shard names of a set are.

    Attributes:
        unit_digits: width of the unit part of a key and of a shard name, >= 5.
        position_digits: width of the position part of a key, from an upper bound of the samples of a unit.
    """

    unit_digits: int
    position_digits: int

    def key(self, unit_index: int, position: int) -> str:
        """Return the key of a sample: zero-padded unit index, then zero-padded position in the unit.

        Raises:
            ArtifactError: the position is wider than the set's keys, because the input grew since it was begun.
        """
        if position >= 10**self.position_digits:
            raise ArtifactError(
                f"key of unit {unit_index}: position must have {self.position_digits} digits, as plan.json of the set "
                f"says, got {position}; put the input back as it was, or use another run_dir"
            )
        return f"{self.stem(unit_index)}{position:0{self.position_digits}d}"

    def split(self, key: str) -> tuple[int, int]:
        """Return the unit index and the position of a key."""
        return int(key[: -self.position_digits]), int(key[-self.position_digits :])

    def stem(self, unit_index: int) -> str:
        """Return the digits that name a unit's shard, ledger record and rejects."""
        return f"{unit_index:0{self.unit_digits}d}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The work units of a source, in order: `units[i].unit_index == i`; `class_names` in label order, if known."""

    units: tuple[WorkUnit, ...]
    keys: KeyFormat
    class_names: tuple[str, ...] | None


class Source(ABC):
    """A corpus; a class of its own for each `source.kind`, made from that kind's config and entered in the registry."""

    @abstractmethod
    def plan(self) -> Plan:
        """Return the work units; lists files, and opens none that holds pixels beyond its footer.

        Raises:
            ArtifactError: nothing is found, or a file is missing or cannot be what the spec says it is.
        """

    @abstractmethod
    def read(self, unit: WorkUnit) -> Iterator[InputSample]:
        """Yield the samples of a work unit in order, positions from 0, those with a problem included.

        Raises:
            ArtifactError: the input is damaged as a whole; samples yielded before must then not be committed.
        """


def make_plan(units: Sequence[WorkUnit], *, max_samples_per_unit: int, class_names: Sequence[str] | None) -> Plan:
    """Return a plan whose keys are wide enough for units of up to `max_samples_per_unit` samples."""
    keys = KeyFormat(
        unit_digits=max(MIN_UNIT_DIGITS, len(str(len(units) - 1))),
        position_digits=len(str(max(1, max_samples_per_unit - 1))),
    )
    return Plan(units=tuple(units), keys=keys, class_names=None if class_names is None else tuple(class_names))


def fingerprint_of(files: Iterable[tuple[str, int]]) -> str:
    """Return the fingerprint of a unit from its files: (name, size), the names saying nothing of where they lie."""
    # What json.dumps writes, in a third of its time.
    listed = ", ".join(f"[{encode_basestring_ascii(name)}, {num_bytes}]" for name, num_bytes in files)
    return hashlib.sha256(f"[{listed}]".encode()).hexdigest()[:16]


def mark_of(infos: Iterable[FileInfo]) -> str:
    """Return the mark of a unit from what a listing says of its files."""
    return hashlib.sha256(" ".join(info.mark for info in infos).encode()).hexdigest()[:16]
