"""Held-out measurement during training: the same samples and the same draws every time.

Invariant: the result depends on the weights, the shard set and the spec only; the draws of a sample do not depend on
the step or the world size. The weights are the raw ones, also where an average of them is kept. Two measures: windows
noised by the schedule, and (window_size > 1) windows filled with the model's own drafts, which is what sampling will
show it (drawn at temperature 1, whatever training draws at); of the second only offset 0, the code that is kept,
counts. It costs three forward passes of the samples (one at window_size 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from pipeline.loader import check_labels
from pipeline.philox import Int64Array
from pipeline.shard_set import ShardSet
from training.config import TrainConfig
from training.engine import Engine
from training.inputs import VALIDATION_STEP, make_inputs, with_own_drafts
from training.loss import window_loss
from training.ranks import Ranks
from training.scored import score_predictions

_LABELS_AT_A_TIME = 1024


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """Means over the held-out samples."""

    loss: float
    loss_of_offset: list[float]
    accuracy_of_offset: list[float]
    own_draft_loss_0: float
    """Loss of offset 0 where windows hold the model's own drafts; at window_size 1, that of offset 0."""


class Validation:
    """The held-out samples of one rank."""

    def __init__(self, shard_set: ShardSet, *, config: TrainConfig, ranks: Ranks) -> None:
        """Take samples spread evenly over `shard_set`, and deal them out to the ranks.

        Raises:
            ArtifactError: a sample is damaged, or its label is not one of the model's classes.
        """
        assert config.validation is not None
        self._config, self._ranks, self._shard_set = config, ranks, shard_set
        count = min(config.validation.num_samples, shard_set.num_samples)
        spread = np.arange(count, dtype=np.int64) * shard_set.num_samples // count
        self._sample_indices = spread[ranks.rank :: ranks.world_size]
        for begin in range(0, len(self._sample_indices), _LABELS_AT_A_TIME):
            indices = self._sample_indices[begin : begin + _LABELS_AT_A_TIME]
            _, labels = shard_set.read_batch(indices, views=np.zeros_like(indices))
            check_labels(labels, indices, shard_set=shard_set, num_classes=config.model.num_classes)
        self._micro_batch_size = config.engine.samples_per_micro_step(ranks.world_size)
        self.every_n_steps = config.validation.every_n_steps
        """Steps between measurements."""
        self._num_micro_batches = -(-count // (ranks.world_size * self._micro_batch_size))

    def measure(self, engine: Engine, *, on_batch: Callable[[], None]) -> ValidationResult:
        """Return the measures of the engine's present weights; called by every rank.

        Args:
            engine: whose weights.
            on_batch: called before every micro batch.
        """
        window_size = self._config.model.window_size
        sums = torch.zeros(2 * window_size + 2, dtype=torch.float64, device=self._ranks.device)
        engine.eval()
        with torch.no_grad():
            for sample_indices in self._micro_batches():
                on_batch()
                sums += self._sums_of_batch(engine, sample_indices)
        engine.train()
        sums = self._ranks.sum(sums).cpu()
        means: list[float] = (sums[:-1] / sums[-1]).tolist()
        losses, accuracies = means[:window_size], means[window_size : 2 * window_size]
        weights = self._config.noise.weights_of_offsets(window_size)
        return ValidationResult(
            loss=sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights),
            loss_of_offset=losses,
            accuracy_of_offset=accuracies,
            own_draft_loss_0=means[-1],
        )

    def _micro_batches(self) -> Iterator[Int64Array]:
        # Every rank makes as many passes as the others (ZeRO-3 gathers weights in each), the last perhaps empty.
        for index in range(self._num_micro_batches):
            yield self._sample_indices[index * self._micro_batch_size : (index + 1) * self._micro_batch_size]

    def _sums_of_batch(self, engine: Engine, sample_indices: Int64Array) -> torch.Tensor:
        """Return sums over the batch: loss and accuracy of each offset, own-draft loss of offset 0, sample count."""
        read = sample_indices if len(sample_indices) else np.zeros(1, dtype=np.int64)
        codes_BT, labels_B = self._shard_set.read_batch(read, views=np.zeros_like(read))
        inputs = make_inputs(
            codes_BT,
            labels_B,
            read,
            config=self._config,
            step=VALIDATION_STEP,
            label_dropout=0.0,
            device=self._ranks.device,
        )
        scored = score_predictions(inputs.codes_BT, window_size=self._config.model.window_size)
        loss_of = partial(window_loss, engine.module, scored=scored, ops=self._config.engine.ops)
        noised = loss_of(inputs.windows_BTK, inputs.labels_B)
        own_draft_loss_0 = noised.loss_of_offset_K[:1]
        if self._config.model.window_size > 1:
            inputs = with_own_drafts(inputs, engine.module, config=self._config, step=VALIDATION_STEP)
            drafted = loss_of(inputs.windows_BTK, inputs.labels_B)
            own_draft_loss_0 = drafted.loss_of_offset_K[:1]
        means = torch.cat([noised.loss_of_offset_K, noised.accuracy_of_offset_K, own_draft_loss_0])
        return torch.cat([means, means.new_ones(1)]).double() * len(sample_indices)
