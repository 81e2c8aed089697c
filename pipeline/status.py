"""How far a tokenize job is: what the driver says while it runs, and what `tensorar status` makes of it.

The invariant: `status.json` is news, not truth: it is rewritten every few seconds while a driver lives, nothing depends
on it, and the counts that `read_status` returns come from the ledger.
"""

from __future__ import annotations

import datetime
import json
import time
from types import TracebackType
from typing import Literal

from pydantic import ValidationError
from rich.table import Table

from pipeline.gathered import Ledger
from pipeline.ledger import MANIFEST_NAME, LedgerRecord, PoisonRecord, read_poison, stem_of
from pipeline.pool import PoolState
from pipeline.rejects import Counts
from pipeline.resume import PLAN_NAME
from pipeline.storage import ArtifactError, Storage
from pipeline.tally import Tally
from tokenization.config import Config

STATUS_NAME = "status.json"
WRITE_INTERVAL_S = 5.0
SILENCE_S = 60.0
"""A driver that has said nothing for so long is presumed dead."""
MAX_NAMED_UNITS = 8


class Status(Config):
    """What the driver says of itself: `status.json`."""

    version: Literal[1] = 1
    """Version of this format."""
    state: Literal["running", "ended", "failed"]
    """`ended` also after Ctrl-C; a killed driver stays `running` and falls silent."""
    time: datetime.datetime
    """When it was written, UTC."""
    units_in_flight: list[str]
    """Names of the units in the hands of workers."""
    num_workers: int
    """Workers that had started."""
    samples_per_s: float
    """Samples read per second in this run."""
    eta_s: float | None
    """Seconds until the last unit, at the pace of this run."""


class StatusFile:
    """Writes `status.json` now and then while the body of its context runs."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._written_s = -WRITE_INTERVAL_S
        self._last = (PoolState(units_in_flight=(), num_read_in_flight=0, num_workers=0), 0.0, None)

    def __enter__(self) -> StatusFile:
        return self

    def write(self, state: PoolState, *, samples_per_s: float, eta_s: float | None) -> None:
        """Write what the job is doing, if it was not written just now."""
        self._last = (state, samples_per_s, eta_s)
        if time.monotonic() - self._written_s >= WRITE_INTERVAL_S:
            self._written_s = time.monotonic()
            self._write("running")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write("failed" if isinstance(error, Exception) else "ended")
