"""What a run measured and said: metrics.jsonl (the record), TensorBoard and W&B (for people), one log file per rank.

Invariant: metrics.jsonl holds each (step, split) once, in step order, as if the run had never stopped. What is measured
is a pure function of the run; times, rates and memory are not. A measure that is not finite is null: its step was
skipped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from training.json_lines import JsonLines, read_json_lines

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
LOGS = "logs"
_LOGGED_PACKAGES = ("pipeline", "training")


class Board(Protocol):
    """Shows numbers by step to people."""

    def show(self, step: int, numbers: dict[str, float]) -> None:
        """Add numbers of a step, by tag (`train/loss`)."""

    def close(self) -> None:
        """Flush and close."""


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl in order; a torn last line is left out."""
    return read_json_lines(run_dir / METRICS)


def describe_line(line: dict[str, Any], *, num_steps: int) -> str:
    """Return a line of metrics.jsonl as people read it in a log."""
    losses = f"loss={describe_number(line['loss'], '.4f')} loss_0={describe_number(line['loss_of_offset'][0], '.4f')}"
    head = f"step={line['step']}/{num_steps} {line['split']} {losses}"
    if line["split"] == "validation":
        return f"{head} own_draft_loss_0={describe_number(line['own_draft_loss_0'], '.4f')}"
    eta_s = (num_steps - line["step"]) * line["step_s"]
    rates = f"learning_rate={line['learning_rate']:.3g} {describe_speed(line)}"
    return f"{head} {rates} eta_s={eta_s:.0f}"


def describe_speed(line: dict[str, Any]) -> str:
    """Return how fast a line's steps were, and what people should know if it is not zero."""
    parts = [f"samples_per_s={line['samples_per_s']:.1f}"]
    if line.get("mfu") is not None:
        parts.append(f"mfu={100 * line['mfu']:.1f}%")
    if line.get("data_wait_share", 0.0) >= 0.005:
        parts.append(f"data_wait={100 * line['data_wait_share']:.0f}%")
    if line.get("num_replaced_samples"):
        parts.append(f"replaced_samples={line['num_replaced_samples']}")
    if line.get("num_skipped_steps"):
        parts.append(f"skipped_steps={line['num_skipped_steps']}")
    return " ".join(parts)


def describe_number(value: float | None, format_spec: str) -> str:
    """Return a measure as people read it; null in a line is what was not finite."""
    return "not finite" if value is None else format(value, format_spec)


class MetricsLog:
    """The open metrics of a run; only rank 0 has one."""

    def __init__(self, run_dir: Path, *, step: int, boards: Sequence[Board] = ()) -> None:
        """Open for appending after `step`, cutting off what is beyond it.

        Args:
            run_dir: of the run; made where it is missing.
            step: steps that the run has taken, 0 for a new one.
            boards: shown the same numbers, besides TensorBoard.
        """
        self._lines = JsonLines(run_dir / METRICS, step=step)
        self.elapsed_s = float(self._lines.kept[-1]["elapsed_s"]) if self._lines.kept else 0.0
        """Seconds of training behind the last kept line, over all processes that wrote it."""
        self._boards = [_TensorBoard(run_dir / TENSORBOARD, step=step), *boards]

    def write(self, line: dict[str, Any]) -> dict[str, Any]:
        """Append one line and return it as it is written: what is not finite is None.

        Args:
            line: `step`, `split` and numbers or lists of numbers (one per offset).
        """
        line = {name: _finite(value) for name, value in line.items()}
        self._lines.write(line)
        numbers = dict(_numbers_by_tag(line))
        for board in self._boards:
            board.show(line["step"], numbers)
        return line

    def close(self) -> None:
        """Flush and close."""
        self._lines.close()
        for board in self._boards:
            board.close()


class _TensorBoard:
    def __init__(self, directory: Path, *, step: int) -> None:
        self._writer = SummaryWriter(str(directory), purge_step=step + 1, flush_secs=10)

    def show(self, step: int, numbers: dict[str, float]) -> None:
        for tag, number in numbers.items():
            self._writer.add_scalar(tag, number, step)

    def close(self) -> None:
        self._writer.close()


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers_by_tag(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if name in ("step", "split"):
            continue
        tag = f"{line['split']}/{name}"
        entries = [(f"{tag}/{offset}", entry) for offset, entry in enumerate(value)] if isinstance(value, list) else []
        yield from ((name, entry) for name, entry in entries or [(tag, value)] if entry is not None)


def rank_log_path(run_dir: Path, *, rank: int) -> Path:
    """Return the file of a rank's log."""
    return run_dir / LOGS / f"rank_{rank:05d}.log"


@contextmanager
def rank_log(run_dir: Path, *, rank: int) -> Iterator[None]:
    """Copy what this process logs into `run_dir/logs/rank_00000.log`: the project's progress, everybody's trouble."""
    path = rank_log_path(run_dir, rank=rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    for package in _LOGGED_PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)
    try:
        yield
    except BaseException:
        logger.exception("rank %d failed", rank)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
