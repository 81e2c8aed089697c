"""Seconds spent in each stage of the demo, added up over its interrupted runs and kept beside them.

A stage that has come to its end is not timed again: looking whether there is anything to do is not its work.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import NonNegativeFloat

from pipeline.local_storage import write_json
from tokenization.config import Config

TIMINGS_NAME = "timings.json"


class StageTime(Config):
    """Time of one stage so far."""

    seconds_s: NonNegativeFloat
    """Seconds over all runs up to its first end."""
    is_finished: bool
    """Whether it has come to its end."""


def read_timings(run_root: Path) -> dict[str, StageTime]:
    """Time of each stage, in the order in which the stages first ran."""
    path = run_root / TIMINGS_NAME
    times = json.loads(path.read_text()) if path.is_file() else {}
    return {stage: StageTime.model_validate(time) for stage, time in times.items()}


def add_time(run_root: Path, *, stage: str, seconds_s: float, is_finished: bool, is_new: bool) -> None:
    """Keep the time of one more run of a stage.

    Args:
        run_root: Where the demo's runs are.
        stage: Its name.
        seconds_s: How long this run of it took.
        is_finished: Whether it came to its end.
        is_new: Whether it began with nothing done; what an earlier stage of this name took is then forgotten.
    """
    timings = read_timings(run_root)
    before = StageTime(seconds_s=0.0, is_finished=False) if is_new else timings.get(stage)
    if before is not None and before.is_finished:
        return
    seconds_before_s = before.seconds_s if before is not None else 0.0
    timings[stage] = StageTime(seconds_s=round(seconds_before_s + seconds_s, 2), is_finished=is_finished)
    write_json(run_root / TIMINGS_NAME, {name: time.model_dump() for name, time in timings.items()})
