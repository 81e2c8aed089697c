"""The ledger of a set as the driver reads it: its records, gathered into few files beside them.

The invariant: the records under `ledger/` are the truth and the gathered files a copy of some of them: an entry counts
only while the listing of `ledger/` shows the same size and mark, everything else is read one by one. So a rerun over
100,000 units on S3 makes 100 listings and 100 reads, not 100,000; losing all gathered files costs one slow start.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ledger import LedgerRecord, NewerVersionError, parse_record, record_name, stem_of
from pipeline.storage import ArtifactError, FileInfo, Storage, json_bytes, next_action
from pipeline.tally import Tally

RECORDS_PER_FILE = 1000
NUM_READ_THREADS = 16
_PREFIX = "ledger/gathered-"

logger = logging.getLogger(__name__)


class _Line(NamedTuple):
    """One line of a gathered file: a unit's digits, the mark of its record, and the record's bytes."""

    stem: str
    mark: str
    record: bytes


class Ledger:
    """The records of a set; one driver reads and gathers them."""

    def __init__(self, storage: Storage) -> None:
        """List `ledger/`; nothing is read yet."""
        self._storage = storage
        listing = storage.list("ledger/")
        self._gathered_names = [name for name in listing if name.startswith(_PREFIX)]
        self._committed = {stem_of(name): info for name, info in listing.items() if name.endswith(".json")}
        self._ungathered: list[_Line] = []

    def records(self) -> Iterator[tuple[str, LedgerRecord | ArtifactError]]:
        """Yield the record of every unit, or what is wrong with it, by the unit's digits, once; in no fixed order.

        Raises:
            ArtifactError: one cannot be read just now; it may be whole.
        """
        unseen, self._committed = self._committed, {}
        for line in self._gathered():
            if unseen.get(line.stem) == FileInfo(num_bytes=len(line.record), mark=line.mark):
                del unseen[line.stem]
                yield line.stem, self._parsed(line)
        with ThreadPoolExecutor(NUM_READ_THREADS) as threads:
            for stems in _batched(list(unseen), RECORDS_PER_FILE):
                for part in threads.map(self._read_all, _batched(stems, RECORDS_PER_FILE // NUM_READ_THREADS)):
                    for stem, data in part:
                        if isinstance(data, ArtifactError):
                            yield stem, data
                        else:
                            self._ungathered.append(_Line(stem, unseen.pop(stem).mark, data))
                            yield stem, self._parsed(self._ungathered[-1])
                if len(self._ungathered) >= RECORDS_PER_FILE:
                    self.gather()

    def tally(self) -> Tally:
        """Return the sum of the records that are whole, each unit once.

        Raises:
            ArtifactError: as `records`.
            NewerVersionError: a newer tensorar wrote one.
        """
        tally = Tally()
        for _, record in self.records():
            if isinstance(record, NewerVersionError):
                raise record
            if isinstance(record, LedgerRecord) and record.unit_index not in tally:
                tally.add(record)
        return tally

    def forget(self, stem: str) -> None:
        """Remove the record of a unit that is about to be done again."""
        self._storage.remove(record_name(stem))
        self._ungathered = [line for line in self._ungathered if line.stem != stem]

    def note(self, stem: str, record: LedgerRecord, *, mark: str) -> None:
        """Take note of a record that a worker has just committed with this mark; gathers when there are enough."""
        self._ungathered.append(_Line(stem, mark, json_bytes(record.model_dump(mode="json"))))
        if len(self._ungathered) >= RECORDS_PER_FILE:
            self.gather()

    def gather(self) -> None:
        """Write the records that no gathered file holds yet, if there are any, into a new one."""
        if not self._ungathered:
            return
        number = 1 + max((int(name.removeprefix(_PREFIX)[:6]) for name in self._gathered_names), default=-1)
        name = f"{_PREFIX}{number:06d}.parquet"
        columns = [_column(values) for values in zip(*self._ungathered, strict=True)]
        table = pa.Table.from_arrays(columns, names=_Line._fields)
        with self._storage.stage(name) as staged_path:
            pq.write_table(table, staged_path, compression="zstd")
        self._gathered_names.append(name)
        self._ungathered = []

    def _gathered(self) -> Iterator[_Line]:
        for name in reversed(self._gathered_names):  # the newest word on a unit comes first
            try:
                with self._storage.open(name) as file:
                    columns = pq.ParquetFile(file).read(use_threads=False).to_pydict()
            except (OSError, pa.ArrowException) as error:
                logger.warning("read %s: %s; its records are read one by one", self._storage.url_of(name), error)
                continue
            yield from map(_Line, columns["stem"], columns["mark"], columns["record"])

    def _read_all(self, stems: list[str]) -> list[tuple[str, bytes | ArtifactError]]:
        return [(stem, self._read(stem)) for stem in stems]

    def _read(self, stem: str) -> bytes | ArtifactError:
        doing = f"read {self._storage.url_of(record_name(stem))}"
        try:
            return self._storage.read_bytes(record_name(stem))
        except FileNotFoundError:
            return ArtifactError(f"{doing}: it is gone since it was listed; rerun the tokenize job")
        except OSError as error:
            action = next_action(error, otherwise="mend that and run the same command again")
            raise ArtifactError(f"{doing}: it must be readable, got {error}; {action}") from error

    def _parsed(self, line: _Line) -> LedgerRecord | ArtifactError:
        try:
            return parse_record(self._storage, line.stem, line.record)
        except ArtifactError as error:
            return error


def _column(values: Sequence[str | bytes]) -> pa.Array:
    """Return values of one type as a column: `pa.array` would import pandas to look at them, 57 MB of memory."""
    encoded = [value.encode() if isinstance(value, str) else value for value in values]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    kind = pa.string() if isinstance(values[0], str) else pa.binary()
    return pa.Array.from_buffers(kind, len(encoded), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))])


def _batched(stems: list[str], size: int) -> Iterator[list[str]]:
    return (stems[start : start + size] for start in range(0, len(stems), size))
