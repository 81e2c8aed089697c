"""The steps that a run skipped because their loss or gradient norm was not finite: counted, recorded, limited.

Invariant: all ranks agree on what is skipped and hold the same count, which a checkpoint keeps; skipped_steps.jsonl
names the samples, so that what is damaged can be found. A skipped step has its number and its samples like any other,
and leaves weights, optimiser and average as they were.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

from training.config import TrainConfig
from training.json_lines import JsonLines
from training.ranks import Ranks

logger = logging.getLogger(__name__)

SKIPPED_STEPS = "skipped_steps.jsonl"


class SkippedSteps:
    """The skipped steps of a run so far."""

    def __init__(self, config: TrainConfig, *, ranks: Ranks, directory: Path, step: int, count: int) -> None:
        """Go on after `step`, `count` steps having been skipped.

        Args:
            config: of the run; says how many there may be.
            ranks: rank 0 writes.
            directory: of skipped_steps.jsonl.
            step: steps taken.
            count: of them, skipped.
        """
        self._config, self._ranks, self._path = config, ranks, directory / SKIPPED_STEPS
        self._lines = JsonLines(self._path, step=step) if ranks.is_first else None
        self.count = count
        """Steps skipped so far."""

    def add(self, step: int, *, loss: float, grad_norm: float, sample_names: Callable[[], list[str]]) -> None:
        """Record a step that was skipped; called by every rank.

        Args:
            step: its number.
            loss: over all ranks.
            grad_norm: before clipping.
            sample_names: gives the samples of this rank that may be the cause.

        Raises:
            FloatingPointError: there are more of them than `max_skipped_steps`; the same on every rank.
        """
        self.count += 1
        names = [name for names in self._ranks.gather(sample_names()) for name in names]
        if self._lines is not None:
            self._lines.write(
                {"step": step, "loss": _in_json(loss), "grad_norm": _in_json(grad_norm), "samples": names}
            )
            logger.warning(
                "step=%d is skipped: loss=%s grad_norm=%s samples=%d skipped_steps=%d; see %s",
                step,
                loss,
                grad_norm,
                len(names),
                self.count,
                self._path,
            )
        if self.count > self._config.max_skipped_steps:
            raise FloatingPointError(
                f"train step {step}: at most max_skipped_steps = {self._config.max_skipped_steps} steps may have a "
                f"loss or gradient norm that is not finite, got {self.count} (loss {loss}, norm {grad_norm}); look at "
                f"their samples in {self._path}, then raise max_skipped_steps and run again (it resumes before this "
                f"step), or lower optimizer.learning_rate in a new run_dir with warm_start: {self._config.run_dir}"
            )

    def close(self) -> None:
        """Flush and close."""
        if self._lines is not None:
            self._lines.close()


def _in_json(value: float) -> float | str:
    """Return a number as JSON can hold it: `nan` and `inf` as text, which tell more than null here."""
    return value if math.isfinite(value) else str(value)
