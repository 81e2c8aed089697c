"""How far a tokenize job is: what the driver says while it runs, and what `tensorar status` makes of it.

The invariant: `status.json` is news, not truth: it is rewritten every few seconds while a driver lives, nothing depends
on it, and the counts that `read_status` returns come from the ledger.
"""

from __future__ import annotations

import datetime
import json
import logging
import time
from types import TracebackType
from typing import Literal

from pydantic import ValidationError
from rich.table import Table

from pipeline.gathered import Ledger
from pipeline.ledger import MANIFEST_NAME, PoisonRecord, read_poison, stem_of
from pipeline.pool import PoolState
from pipeline.rejects import Counts
from pipeline.resume import PLAN_NAME
from pipeline.storage import ArtifactError, Storage, StorageUnavailableError
from tokenization.config import Config

logger = logging.getLogger(__name__)

STATUS_NAME = "status.json"
WRITE_INTERVAL_S = 5.0
SILENCE_S = 60.0
"""A driver that has said nothing for so long is presumed dead."""
MAX_NAMED_UNITS = 8
IDLE = PoolState(units_in_flight=(), num_read_in_flight=0, num_workers=0)


class Status(Config):
    """What the driver says of itself: `status.json`."""

    version: Literal[1] = 1
    """Version of this format."""
    state: Literal["running", "ended", "failed"]
    """`ended` also after Ctrl-C and SIGTERM; a killed driver stays `running` and falls silent."""
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
        self._last: tuple[PoolState, float, float | None] = (IDLE, 0.0, None)

    def __enter__(self) -> StatusFile:
        return self

    def write(self, state: PoolState, *, samples_per_s: float, eta_s: float | None) -> None:
        """Write what the job is doing, if it was not written just now."""
        self._last = (state, samples_per_s, eta_s)
        if time.monotonic() - self._written_s >= WRITE_INTERVAL_S:
            self._written_s = time.monotonic()
            try:
                self._write("running")
            except StorageUnavailableError as error:  # news only; units have attempts of their own
                logger.warning("%s", error)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._write("failed" if isinstance(error, Exception) else "ended")
        except (ArtifactError, OSError) as trouble:  # news only: what ended the job, or Ctrl-C, goes on its way
            logger.warning("%s", trouble)

    def _write(self, state: Literal["running", "ended", "failed"]) -> None:
        pool, samples_per_s, eta_s = self._last
        status = Status(
            state=state,
            time=datetime.datetime.now(datetime.UTC),
            units_in_flight=list(pool.units_in_flight) if state == "running" else [],
            num_workers=pool.num_workers,
            samples_per_s=round(samples_per_s, 1),
            eta_s=None if eta_s is None else round(eta_s, 1),
        )
        self._storage.write_json(STATUS_NAME, status.model_dump(mode="json"))


class JobStatus(Config):
    """How far a job is, by its ledger, and what its driver last said."""

    num_units: int
    """Units of the plan, appended ones included."""
    num_units_done: int
    """Units with a ledger record."""
    poison: list[PoisonRecord]
    """Units that were set aside."""
    is_finished: bool
    """Whether there is a manifest."""
    totals: Counts
    """Where the samples of the units that are done went."""
    seconds_of_stage: dict[str, float]
    """Worker seconds spent in each stage."""
    driver: Status | None
    """The driver's last word; None before the first."""

    @property
    def silence_s(self) -> float:
        """Seconds since the driver's last word."""
        if self.driver is None:
            return 0.0
        return (datetime.datetime.now(datetime.UTC) - self.driver.time).total_seconds()


def read_status(storage: Storage) -> JobStatus:
    """Return how far a tokenize job is; changes nothing and may be called while it runs.

    Raises:
        ArtifactError: the directory was not begun by a tokenize job, or a poison record is damaged.
        NewerVersionError: a newer tensorar wrote a record.
    """
    try:
        num_units = int(json.loads(storage.read_bytes(PLAN_NAME))["num_units"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"status of {storage}: it must hold the plan.json of a tokenize job, got {error}; check the path"
        ) from error
    tally = Ledger(storage).tally()
    return JobStatus(
        num_units=num_units + len(storage.list("retries/")),
        num_units_done=tally.num_units,
        poison=[read_poison(storage, stem_of(name)) for name in storage.list("poison/")],
        is_finished=storage.find(MANIFEST_NAME) is not None,
        totals=tally.totals(),
        seconds_of_stage=dict(sorted(tally.seconds_of_stage.items())),
        driver=_read_driver(storage),
    )


def status_table(job: JobStatus, *, title: str) -> Table:
    """Return the status of a job, for `rich` to print."""
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    in_flight = job.driver.units_in_flight if job.driver is not None and job.silence_s < SILENCE_S else []
    table.add_row("units done", f"{job.num_units_done:,} of {job.num_units:,}")
    table.add_row("units in flight", f"{len(in_flight):,}")
    table.add_row("units set aside", f"{len(job.poison):,}")
    for poison in job.poison[:MAX_NAMED_UNITS]:
        table.add_row(f"  {poison.unit}", poison.problems[-1][:80])
    table.add_row("driver", _describe_driver(job))
    if in_flight and job.driver is not None:
        table.add_row("samples per s", f"{job.driver.samples_per_s:,.1f} by {job.driver.num_workers} workers")
        table.add_row(
            "time left", "?" if job.driver.eta_s is None else str(datetime.timedelta(seconds=int(job.driver.eta_s)))
        )
    table.add_row("samples read", f"{job.totals.num_read:,}")
    table.add_row("  written", f"{job.totals.num_written:,}")
    for reason, number in job.totals.dropped_by_reason.items():
        table.add_row(f"  dropped: {reason}", f"{number:,}")
    for reason, number in job.totals.rejected_by_reason.items():
        table.add_row(f"  rejected: {reason}", f"{number:,}")
    spent = sum(job.seconds_of_stage.values())
    for stage, seconds in job.seconds_of_stage.items():
        table.add_row(f"time in {stage}", f"{seconds:,.1f} s, {seconds / spent:.0%}" if spent else "0 s")
    return table


def _describe_driver(job: JobStatus) -> str:
    if job.is_finished:
        return "finished: the manifest is written"
    if job.driver is None:
        return "has said nothing yet"
    if job.driver.state != "running":
        return f"{job.driver.state} {job.silence_s:,.0f} s ago; run the spec again to go on"
    if job.silence_s >= SILENCE_S:
        return f"silent for {job.silence_s:,.0f} s, probably killed; run the spec again to go on"
    return "running"


def _read_driver(storage: Storage) -> Status | None:
    try:
        return Status.model_validate_json(storage.read_bytes(STATUS_NAME))
    except (FileNotFoundError, ValidationError):
        return None
