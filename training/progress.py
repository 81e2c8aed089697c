"""What people see of a run while it goes on, and the lines of metrics.jsonl that say the same; rank 0 only.

Invariant: the measured values of a line are those of its own step, and counts those of the run up to it, so that the
line is the same whether or not the run was killed before it; times and rates are means over the steps since the last.
Validation and saving are not in step times; the stall of saving has a field of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from training.config import TrainConfig
from training.engine import learning_rate_of_step
from training.flops import model_flops_per_sample
from training.hardware import measured_peak_flops, peak_memory_bytes
from training.metrics import Board, MetricsLog, describe_line
from training.ranks import Ranks
from training.validation import ValidationResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepMeasures:
    """One step, over the whole global batch."""

    loss: float
    loss_of_offset: list[float]
    accuracy_of_offset: list[float]
    grad_norm: float
    """Before clipping."""
    num_skipped_steps: int
    """Steps of the run so far that were skipped, this one included."""
    num_replaced_samples: int
    """Damaged samples of the run so far that others took the place of, this step's included."""


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Where the wall time of one step went."""

    step_s: float
    """All of it, reading included."""
    data_wait_s: float
    """Of it, waiting for a batch; the mean over the ranks."""


class Speed:
    """What the costs of a run's steps mean: rates, and the share of the devices' peak (MFU)."""

    def __init__(self, config: TrainConfig, *, ranks: Ranks) -> None:
        """Measure the peak where `engine.peak_tflops` does not give it (under a second)."""
        engine = config.engine
        self._batch_size, self._num_positions = engine.global_batch_size, config.model.num_positions
        self._flops_per_sample = model_flops_per_sample(
            config.model,
            micro_batch_size=engine.samples_per_micro_step(ranks.world_size),
            scored_stride=config.noise.scored_stride,
        )
        if engine.peak_tflops is None:
            peak = measured_peak_flops(ranks.device, dtype=getattr(torch, engine.dtype))
        else:
            peak = engine.peak_tflops * 1e12
        self._peak_flops_per_s = peak * ranks.world_size
        logger.info(
            "speed: model_gflops_per_sample=%.4g peak_tflops=%.4g (of one device, %s) devices=%d",
            self._flops_per_sample / 1e9,
            peak / 1e12,
            f"measured in {engine.dtype}" if engine.peak_tflops is None else "given",
            ranks.world_size,
        )

    def rates(self, costs: Sequence[StepCosts]) -> dict[str, float]:
        """Return what a line says of the steps since the last one; tokens are predicted codes, T per sample."""
        step_s = sum(entry.step_s for entry in costs) / len(costs)
        data_wait_s = sum(entry.data_wait_s for entry in costs) / len(costs)
        samples_per_s = self._batch_size / step_s
        flops_per_s = self._flops_per_sample * samples_per_s
        return {
            "step_s": step_s,
            "samples_per_s": samples_per_s,
            "tokens_per_s": samples_per_s * self._num_positions,
            "model_flops_per_s": flops_per_s,
            "mfu": flops_per_s / self._peak_flops_per_s,
            "data_wait_s": data_wait_s,
            "data_wait_share": data_wait_s / step_s,
        }


class Progress:
    """Writes the metrics of a run and logs a line for each."""

    def __init__(
        self, config: TrainConfig, *, ranks: Ranks, directory: Path, step: int, boards: Sequence[Board] = ()
    ) -> None:
        """Go on after `step` steps.

        Args:
            config: of the run.
            ranks: of the run.
            directory: that metrics are written in.
            step: steps taken; 0 for a new run.
            boards: shown the metrics too.
        """
        self._config, self._device = config, ranks.device
        self._speed = Speed(config, ranks=ranks)
        self._log = MetricsLog(directory, step=step, boards=boards)
        self._began = time.perf_counter() - self._log.elapsed_s
        self._costs: list[StepCosts] = []
        self._save_stall_s = 0.0

    def after_step(self, step: int, measures: StepMeasures, costs: StepCosts) -> None:
        """Count a step; every `log_every_n_steps`, on the first and on the last, write and log a line."""
        config = self._config
        self._costs.append(costs)
        if step % config.log_every_n_steps and step not in (1, config.num_steps):
            return
        line = asdict(measures) | {
            "learning_rate": learning_rate_of_step(config.optimizer, step, num_steps=config.num_steps),
            **self._speed.rates(self._costs),
            "save_stall_s": self._save_stall_s,
            "peak_memory_bytes": peak_memory_bytes(self._device),
        }
        self._write(step, "train", line)
        self._costs, self._save_stall_s = [], 0.0

    def after_validation(self, step: int, result: ValidationResult) -> None:
        """Write and log a line of held-out measures."""
        self._write(step, "validation", asdict(result))

    def after_save(self, stall_s: float) -> None:
        """Count the seconds that saving a checkpoint held training up; they are in the next training line."""
        self._save_stall_s += stall_s

    def close(self) -> None:
        """Flush what was written."""
        self._log.close()

    def _write(self, step: int, split: str, measures: dict[str, Any]) -> None:
        elapsed_s = time.perf_counter() - self._began
        line = self._log.write({"step": step, "split": split} | measures | {"elapsed_s": elapsed_s})
        logger.info("%s", describe_line(line, num_steps=self._config.num_steps))
