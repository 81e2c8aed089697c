"""Live progress of a run for the people at its launcher, read from its metrics.jsonl while the ranks write it.

A bar on a terminal, one log line per metrics line elsewhere. It only reads, so it cannot disturb a run; it polls a few
times a second, and sees what any shared file system shows. Of a run on S3 it sees what a rank 0 on this machine writes.
"""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from training.config import TrainConfig
from training.metrics import METRICS, describe_line, describe_number
from training.run_dir import local_run_dir

logger = logging.getLogger(__name__)

_POLL_S = 0.3


def follow_metrics(config: TrainConfig, *, until: threading.Event) -> None:
    """Show what is written to the run's metrics.jsonl, until the event is set."""
    tail = _Tail(local_run_dir(config.run_dir) / METRICS)
    console = Console(stderr=True)
    if console.is_terminal:
        _show_bar(tail, config, until, console)
    else:
        _log_lines(tail, config, until)


class _Tail:
    """New lines of a file that grows, and that a resume may cut shorter; what was there before is not new."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_bytes = path.stat().st_size if path.exists() else 0

    def read(self) -> list[dict[str, Any]]:
        """Return the lines written whole since the last call."""
        if not self._path.exists():
            return []
        begin = min(self._num_bytes, self._path.stat().st_size)
        with self._path.open("rb") as file:
            file.seek(max(0, begin - 1))
            data = file.read()
        # A restart may have cut the file and written past this place: go on at the next line that begins.
        skipped = 0 if begin == 0 else data.find(b"\n") + 1
        if begin > 0 and skipped == 0:
            return []
        *lines, rest = data[skipped:].split(b"\n")
        self._num_bytes = max(0, begin - 1) + len(data) - len(rest)
        return [json.loads(line) for line in lines]


def _log_lines(tail: _Tail, config: TrainConfig, until: threading.Event) -> None:
    is_over = False
    while not is_over:
        is_over = until.wait(_POLL_S)
        for line in tail.read():
            logger.info("%s", describe_line(line, num_steps=config.num_steps))


def _show_bar(tail: _Tail, config: TrainConfig, until: threading.Event, console: Console) -> None:
    columns = (
        TextColumn("[bold]train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(f"starting {config.cluster.num_workers} ranks", total=config.num_steps)
        is_over = False
        while not is_over:
            is_over = until.wait(_POLL_S)
            for line in tail.read():
                first = describe_number(line["loss_of_offset"][0], ".3f")
                losses = f"loss {describe_number(line['loss'], '.3f')}  first code {first}"
                if line["split"] == "train":
                    bar.update(task, completed=line["step"], description=f"{losses}  {_speed(line)}")
                else:
                    drafts = describe_number(line["own_draft_loss_0"], ".3f")
                    bar.console.print(f"step {line['step']}: held out {losses}  own drafts {drafts}")


def _speed(line: dict[str, Any]) -> str:
    replaced, skipped = line.get("num_replaced_samples"), line.get("num_skipped_steps")
    parts = [f"{line['samples_per_s']:.0f} samples/s"]
    parts += [f"mfu {100 * line['mfu']:.0f}%"] if line.get("mfu") is not None else []
    parts += [f"{replaced} replaced"] if replaced else []
    parts += [f"{skipped} skipped"] if skipped else []
    return "  ".join(parts)
