"""What people see of a run while it goes on, and the lines of metrics.jsonl that say the same; rank 0 only.

Invariant: the measured values of a line are those of its own step, so that the line is the same whether or not the run
was killed before it; times are means over the steps since the last line. Validation and saving are not in step times.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.config import TrainConfig
from training.engine import learning_rate_of_step
from training.metrics import MetricsLog, describe_line
from training.validation import ValidationResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepMeasures:
    """One step, over the whole global batch."""

    loss: float
    loss_of_offset: list[float]
    accuracy_of_offset: list[float]
    grad_norm: float | None
    """Before clipping; none where the engine does not compute it."""
    step_s: float
    """Wall time of the step, reading included."""
    data_wait_s: float
    """Of it, rank 0's wait for its batch."""


class Progress:
    """Writes the metrics of a run and logs a line for each."""

    def __init__(self, config: TrainConfig, *, step: int) -> None:
        """Go on after `step` steps; 0 for a new run."""
        self._config = config
        self._log = MetricsLog(Path(config.run_dir), step=step)
        self._began = time.perf_counter() - self._log.elapsed_s
        self._num_steps, self._step_s, self._data_wait_s = 0, 0.0, 0.0

    def after_step(self, step: int, measures: StepMeasures) -> None:
        """Count a step; every `log_every_n_steps`, on the first and on the last, write and log a line."""
        config = self._config
        self._num_steps += 1
        self._step_s += measures.step_s
        self._data_wait_s += measures.data_wait_s
        if step % config.log_every_n_steps and step not in (1, config.num_steps):
            return
        means = {
            "learning_rate": learning_rate_of_step(config.optimizer, step, num_steps=config.num_steps),
            "samples_per_s": config.engine.global_batch_size * self._num_steps / self._step_s,
            "step_s": self._step_s / self._num_steps,
            "data_wait_s": self._data_wait_s / self._num_steps,
        }
        self._write(step, "train", asdict(measures) | means)
        self._num_steps, self._step_s, self._data_wait_s = 0, 0.0, 0.0

    def after_validation(self, step: int, result: ValidationResult) -> None:
        """Write and log a line of held-out measures."""
        self._write(step, "validation", asdict(result))

    def close(self) -> None:
        """Flush what was written."""
        self._log.close()

    def _write(self, step: int, split: str, measures: dict[str, Any]) -> None:
        elapsed_s = time.perf_counter() - self._began
        line = {"step": step, "split": split} | measures | {"elapsed_s": elapsed_s}
        self._log.write(line)
        logger.info("%s", describe_line(line, num_steps=self._config.num_steps))
