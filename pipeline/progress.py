"""What a person sees of a tokenize job: live progress and the final table.

On a terminal a bar is redrawn on stderr; elsewhere the same figures are one log line every few seconds, so that a job's
log stays readable.
"""

from __future__ import annotations

import logging
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pipeline.ledger import Manifest
from pipeline.pool import PoolState
from pipeline.rejects import Counts

LOG_INTERVAL_S = 5.0
POLL_GRACE_S = 0.5
"""About how long the first samples were under way before they were heard of."""

logger = logging.getLogger(__name__)


class LiveProgress:
    """Counts of a running job, shown as it runs."""

    def __init__(self, *, num_units: int, num_units_done: int, show: bool) -> None:
        """Begin to show.

        Args:
            num_units: all units of the plan.
            num_units_done: units finished by earlier runs.
            show: whether a terminal gets a bar; log lines are written in any case.
        """
        self._num_units, self._num_units_done, self._num_units_before = num_units, num_units_done, num_units_done
        self._num_read = self._num_read_in_all = self._num_rejected = 0
        self._start_s: float | None = None
        self._logged_s = time.monotonic()
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if show and console.is_terminal:
            figures = TextColumn("units  {task.fields[figures]}")
            columns = (TextColumn("tokenizing"), BarColumn(), MofNCompleteColumn(), figures, TimeElapsedColumn())
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("units", total=num_units, completed=num_units_done, figures="starting")

    def __enter__(self) -> LiveProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add_unit(self, counts: Counts) -> None:
        """Take note of a finished unit."""
        self._num_units_done += 1
        self._num_read += counts.num_read
        self._num_rejected += counts.num_rejected

    @property
    def samples_per_s(self) -> float:
        """Samples read per second since the first of this run; 0 before it."""
        return 0.0 if self._start_s is None else self._num_read_in_all / (time.monotonic() - self._start_s)

    @property
    def eta_s(self) -> float | None:
        """Seconds that the units left will take at the pace of this run; None before the first is done."""
        num_done = self._num_units_done - self._num_units_before
        if self._start_s is None or num_done == 0:
            return None
        return (time.monotonic() - self._start_s) / num_done * (self._num_units - self._num_units_done)

    def show(self, state: PoolState) -> None:
        """Draw, or log if it is time to."""
        now_s = time.monotonic()
        self._num_read_in_all = self._num_read + state.num_read_in_flight
        if self._start_s is None and self._num_read_in_all > 0:
            self._start_s = now_s - POLL_GRACE_S  # the clock starts with the first samples, not with Ray
        if self._bar is not None:
            figures = f"{self._num_read_in_all} samples  {self.samples_per_s:.1f}/s  {self._num_rejected} rejected"
            if state.num_workers == 0:
                figures = "starting workers"
            self._bar.update(self._task, completed=self._num_units_done, figures=figures)
        elif now_s - self._logged_s >= LOG_INTERVAL_S:
            self._logged_s = now_s
            logger.info(
                "tokenizing: units=%d/%d samples=%d samples_per_s=%.1f eta_s=%s rejected=%d workers=%d",
                self._num_units_done,
                self._num_units,
                self._num_read_in_all,
                self.samples_per_s,
                "?" if self.eta_s is None else f"{self.eta_s:.0f}",
                self._num_rejected,
                state.num_workers,
            )


def summary_table(manifest: Manifest) -> Table:
    """Return the final table of a shard set, for `rich` to print."""
    totals = manifest.totals
    table = Table(title="shard set", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("shards", f"{len(manifest.shards):,}")
    table.add_row("samples written", f"{totals.num_written:,} of {totals.num_read:,} read")
    table.add_row("codes", f"{totals.num_written * manifest.num_views * manifest.codes_per_image:,}")
    table.add_row("size", f"{sum(shard.bytes for shard in manifest.shards) / 2**20:,.1f} MiB")
    table.add_row("dropped", f"{totals.num_dropped:,}")
    for reason, number in totals.dropped_by_reason.items():
        table.add_row(f"  {reason}", f"{number:,}")
    table.add_row("rejected", f"{totals.num_rejected:,}")
    for reason, number in totals.rejected_by_reason.items():
        table.add_row(f"  {reason}", f"{number:,}")
    if manifest.poison_units:
        table.add_row("units set aside", f"{len(manifest.poison_units):,}")
    table.add_row("tokenizer", manifest.fingerprint.digest)
    return table
