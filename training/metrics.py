"""What a run measured and said: metrics.jsonl (the record), TensorBoard (for people), and one log file per rank.

Invariant: metrics.jsonl holds each (step, split) once, in step order. On resume it is cut at the checkpoint, so that it
reads as if the run had never stopped. Each line is flushed when it is written; a torn last line is dropped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
_LOGGED_PACKAGES = ("pipeline", "training")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl in order; a torn last line is left out."""
    path = run_dir / METRICS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def describe_line(line: dict[str, Any], *, num_steps: int) -> str:
    """Return a line of metrics.jsonl as people read it in a log."""
    losses = f"loss={line['loss']:.4f} loss_0={line['loss_of_offset'][0]:.4f}"
    head = f"step={line['step']}/{num_steps} {line['split']} {losses}"
    if line["split"] == "validation":
        return f"{head} own_draft_loss_0={line['own_draft_loss_0']:.4f}"
    eta_s = (num_steps - line["step"]) * line["step_s"]
    rates = f"learning_rate={line['learning_rate']:.3g} samples_per_s={line['samples_per_s']:.1f}"
    return f"{head} {rates} eta_s={eta_s:.0f}"


class MetricsLog:
    """The open metrics of a run; only rank 0 has one."""

    def __init__(self, run_dir: Path, *, step: int) -> None:
        """Open for appending after `step`, cutting off what is beyond it.

        Args:
            run_dir: of the run; made where it is missing.
            step: steps that the run has taken, 0 for a new one.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = (run_dir / METRICS).open("a+", encoding="utf-8")
        kept = [line for line in read_metrics(run_dir) if line["step"] <= step]
        self._file.truncate(sum(len(_encode(line)) for line in kept))
        self.elapsed_s = float(kept[-1]["elapsed_s"]) if kept else 0.0
        """Seconds of training behind the last kept line, over all processes that wrote it."""
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1, flush_secs=10)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line.

        Args:
            line: `step`, `split` and numbers or lists of numbers (one per offset).
        """
        self._file.write(_encode(line))
        self._file.flush()
        for name, value in line.items():
            if name in ("step", "split") or value is None:
                continue
            for suffix, number in enumerate(value) if isinstance(value, list) else [("", value)]:
                tag = f"{line['split']}/{name}" + (f"/{suffix}" if suffix != "" else "")
                self._tensorboard.add_scalar(tag, number, line["step"])

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        self._tensorboard.close()


def _encode(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"  # ASCII, so characters are bytes; decoding and encoding again changes nothing


@contextmanager
def rank_log(run_dir: Path, *, rank: int) -> Iterator[None]:
    """Copy what this process logs into `run_dir/logs/rank_00000.log`: the project's progress, everybody's trouble."""
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(run_dir / "logs" / f"rank_{rank:05d}.log", encoding="utf-8")
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
