"""One optimiser step on one rank: forward and backward of its micro batches, one reduction, one update or none.

Invariant: a pure function of (weights, batch, spec, step, world size); every draw is keyed by them. All that the ranks
must agree on travels in the one reduction, between backward and update: the measures, whether the loss is finite,
whether anybody was told to stop. The update is then taken, or skipped, by all ranks alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.loader import Batch
from pipeline.philox import Int64Array
from training.config import TrainConfig
from training.engine import Engine, freeze_base, learning_rate_of_step, set_learning_rate, take_step
from training.hardware import repeatable_kernels
from training.inputs import Inputs, dropout_seed, make_inputs, uses_own_drafts, with_own_drafts
from training.loss import window_loss
from training.ranks import Ranks
from training.scored import Scored, draw_phases, score_predictions
from training.watchdog import Watchdog


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a step came to, the same on every rank but for the last field."""

    loss: float
    """Mean over the global batch, as the next two."""
    loss_of_offset: list[float]
    accuracy_of_offset: list[float]
    grad_norm: float
    """Before clipping; not finite where the loss is not."""
    data_wait_s: float
    """Mean over the ranks."""
    num_replaced: int
    """Damaged samples of the global batch that others took the place of."""
    is_stopped: bool
    """Whether any rank was told to stop."""
    suspects_B: Int64Array
    """Positions in this rank's batch of the samples in micro batches whose loss is not finite."""

    @property
    def is_skipped(self) -> bool:
        """Whether weights and optimiser are as before, since loss or norm is not finite."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))


class Stepper:
    """Takes the steps of a run on one rank."""

    def __init__(self, config: TrainConfig, *, engine: Engine, ranks: Ranks, watchdog: Watchdog) -> None:
        """Take them with `engine`, telling `watchdog` each phase."""
        self.engine, self.ranks, self.watchdog = engine, ranks, watchdog
        self._config = config
        self._num_micro_steps = config.engine.grad_accumulation(ranks.world_size)

    def take(
        self, batch: Batch, *, step: int, num_skipped_steps: int, data_wait_s: float, is_told_to_stop: bool
    ) -> StepOutcome:
        """Return the outcome of a step; called by every rank.

        Args:
            batch: this rank's part of the global batch.
            step: its number, from 1 on.
            num_skipped_steps: how many of the steps before it changed nothing.
            data_wait_s: what this rank waited for the batch.
            is_told_to_stop: whether this rank was.
        """
        config = self._config
        rate = learning_rate_of_step(config.optimizer, step, num_steps=config.num_steps)
        set_learning_rate(self.engine, rate)
        num_updates = step - 1 - num_skipped_steps
        freeze_base(self.engine, is_frozen=num_updates < config.optimizer.module_warmup_steps)
        measures = torch.stack([self._take_micro_step(batch, step, index) for index in range(self._num_micro_steps)])
        self.watchdog.enter("reduce", step=step)
        told = measures.new_tensor([float(is_told_to_stop), data_wait_s, float(batch.num_replaced)])
        *sums, num_stops, waits_s, num_replaced = self.ranks.sum(torch.cat([measures.sum(0), told])).tolist()
        means = [value / (self._num_micro_steps * self.ranks.world_size) for value in sums]
        self.watchdog.enter("update", step=step)
        grad_norm = take_step(self.engine, may_update=math.isfinite(means[0]))
        assert grad_norm is not None
        window_size = config.model.window_size
        return StepOutcome(
            loss=means[0],
            loss_of_offset=means[1 : 1 + window_size],
            accuracy_of_offset=means[1 + window_size :],
            grad_norm=grad_norm,
            data_wait_s=waits_s / self.ranks.world_size,
            num_replaced=round(num_replaced),
            is_stopped=num_stops > 0,
            suspects_B=_suspects(measures, batch_size=0 if math.isfinite(means[0]) else len(batch.labels_B)),
        )

    def _take_micro_step(self, batch: Batch, step: int, index: int) -> torch.Tensor:
        """Return loss, losses and accuracies of the offsets of one forward and backward, float64."""
        config = self._config
        self.watchdog.enter("forward", step=step)
        part = self._part(len(batch.labels_B), index)
        inputs = make_inputs(
            batch.codes_BT[part],
            batch.labels_B[part],
            batch.counters_B[part],
            config=config,
            step=step,
            label_dropout=config.model.label_dropout,
            device=self.ranks.device,
        )
        if uses_own_drafts(config, step=step):
            inputs = with_own_drafts(inputs, self.engine.module, config=config, step=step)
        torch.manual_seed(dropout_seed(config, step=step, micro_step=index, rank=self.ranks.rank))
        with repeatable_kernels(self.ranks.device):
            result = window_loss(
                self.engine,
                inputs.windows_BTK,
                inputs.labels_B,
                scored=self._score(inputs, step),
                offset_weights=config.noise.weights_of_offsets(config.model.window_size),
                ops=config.engine.ops,
            )
            self.watchdog.enter("backward", step=step)
            self.engine.backward(result.loss)
        if index < self._num_micro_steps - 1:
            take_step(self.engine, may_update=True)  # only counts the micro step
        parts = [result.loss.detach()[None], result.loss_of_offset_K, result.accuracy_of_offset_K]
        return torch.cat(parts).double()

    def _score(self, inputs: Inputs, step: int) -> Scored:
        noise, window_size = self._config.noise, self._config.model.window_size
        phases_BK = draw_phases(
            window_size=window_size,
            stride=noise.scored_stride,
            seed=self._config.seed,
            step=step,
            sample_counters_B=inputs.counters_B,
        )
        return score_predictions(
            inputs.codes_BT,
            window_size=window_size,
            stride=noise.scored_stride,
            phases_BK=phases_BK,
            draft_gradient_scale=noise.draft_gradient_scale,
        )

    def _part(self, batch_size: int, index: int) -> slice:
        size = batch_size // self._num_micro_steps
        return slice(index * size, (index + 1) * size)


def _suspects(measures: torch.Tensor, *, batch_size: int) -> Int64Array:
    """Return where the samples of micro batches are whose own loss is not finite.

    Args:
        measures: (micro steps, measures), the loss first.
        batch_size: samples of this rank; 0 asks the device nothing.
    """
    if batch_size == 0:
        return np.empty(0, dtype=np.int64)
    is_suspect = ~measures[:, 0].isfinite().cpu().numpy()
    suspects: Int64Array = is_suspect.repeat(batch_size // len(measures)).nonzero()[0]
    return suspects
