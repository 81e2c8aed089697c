"""The training loop: shards of codes in, checkpoints and metrics out; needs only torchrun's environment variables.

Invariant: losses are a pure function of (shards, spec, world size): every draw is counter-based and the loader's
position is one integer, so a run that is killed anywhere and started again goes on bit for bit. A finished run started
again returns at once. SIGTERM (where the main thread runs this) ends the run after a checkpoint.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.loader import Batch, Loader, ShardSet
from pipeline.storage import ArtifactError
from training.checkpoint import CheckpointRecord, RunState, checkpoint_name
from training.config import TrainConfig
from training.engine import Engine, build_engine, grad_norm, learning_rate_of_step, set_learning_rate
from training.inputs import dropout_seed, make_inputs, uses_own_drafts, with_own_drafts
from training.loss import window_loss
from training.metrics import rank_log
from training.progress import Progress, StepMeasures
from training.ranks import Ranks, join_ranks, leave_ranks
from training.resume import find_checkpoint, resume_engine
from training.saver import CheckpointWriter
from training.tensorar import build_model
from training.validation import Validation
from training.weights import warm_start

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a call of `train` ended."""

    step: int
    """Steps that the run has taken in all."""
    is_finished: bool
    """Whether it has taken `num_steps`; False after SIGTERM."""
    checkpoint: str
    """Path or URL of the newest checkpoint."""


def train(config: TrainConfig) -> TrainResult:
    """Train, or go on training, until `num_steps`; called by every rank.

    Args:
        config: of the run; `config.cluster` is not looked at.

    Returns:
        The same on every rank.

    Raises:
        ArtifactError: the shards or the checkpoints do not allow the run; the message says what to do.
        ValueError: the environment or the spec does not fit the world size.
        FloatingPointError: the loss is no longer finite.
    """
    ranks = join_ranks()
    with rank_log(Path(config.run_dir), rank=ranks.rank), _stop_on_sigterm() as stop:
        shard_set, held_out = open_shards(config)
        record = find_checkpoint(config, ranks=ranks, fingerprint=shard_set.manifest.fingerprint)
        if record is not None and record.step >= config.num_steps:
            logger.info("run %s is finished: step=%d", config.run_dir, record.step)
            path = f"{config.run_dir}/{checkpoint_name(record.step)}"
            result = TrainResult(step=record.step, is_finished=True, checkpoint=path)
        else:
            engine = _prepare_engine(config, ranks=ranks, record=record)
            run = _Run(config, engine=engine, ranks=ranks, shard_set=shard_set, held_out=held_out, record=record)
            result = run.train(stop)
        leave_ranks(ranks)
    return result


def open_shards(config: TrainConfig) -> tuple[ShardSet, ShardSet | None]:
    """Return the training and the held-out shard set, checked against each other and against the model.

    Raises:
        ArtifactError: a set is missing or empty, or was not made for this model.
    """
    shard_set = ShardSet.open(config.data.shards)
    side = math.isqrt(shard_set.codes_per_image)
    for field, of_shards in (("codebook_size", shard_set.codebook_size), ("codes_per_side", side)):
        of_model = getattr(config.model, field)
        if of_model != of_shards:
            raise ArtifactError(
                f"train on {config.data.shards}: model.{field} must be that of the codes = {of_shards}, "
                f"got {of_model}; set model.{field}: {of_shards}"
            )
    if config.validation is None:
        return shard_set, None
    return shard_set, ShardSet.open(config.validation.shards, fingerprint=shard_set.manifest.fingerprint)


def _prepare_engine(config: TrainConfig, *, ranks: Ranks, record: CheckpointRecord | None) -> Engine:
    torch.manual_seed(config.seed)
    model = build_model(config.model)
    if record is None and config.warm_start is not None:
        logger.info("warm start from %s", config.warm_start)
        warm_start(model, config.warm_start)
    engine = build_engine(model, config=config, ranks=ranks)
    if record is not None:
        resume_engine(engine, config=config, record=record)
    return engine


@contextmanager
def _stop_on_sigterm() -> Iterator[threading.Event]:
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # under Ray Train, whose workers are stopped by Ray
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)


class _Run:
    """One process's part in a run, from its first step to its last."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        engine: Engine,
        ranks: Ranks,
        shard_set: ShardSet,
        held_out: ShardSet | None,
        record: CheckpointRecord | None,
    ) -> None:
        self._config, self._engine, self._ranks = config, engine, ranks
        self._fingerprint = shard_set.manifest.fingerprint
        self._num_micro_steps = config.engine.grad_accumulation(ranks.world_size)
        self._loader = Loader(
            shard_set,
            config=config.data,
            global_batch_size=config.engine.global_batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            num_classes=config.model.num_classes,
        )
        self._validation = None if held_out is None else Validation(held_out, config=config, ranks=ranks)
        self._writer = CheckpointWriter(config, ranks=ranks, fingerprint=self._fingerprint)
        self._step = 0 if record is None else record.step
        self._samples_consumed = 0 if record is None else record.samples_consumed
        self._progress = Progress(config, step=self._step) if ranks.is_first else None

    def train(self, stop: threading.Event) -> TrainResult:
        """Return how the run ended: at `num_steps`, or after the checkpoint that `stop` asked for."""
        config, progress = self._config, self._progress
        is_last = is_stopped = False
        while not (is_last or is_stopped):
            measures, is_stopped = self._take_step(stop)
            is_last = self._step == config.num_steps
            if progress is not None:
                progress.after_step(self._step, measures)
            if self._validation is not None and (is_last or self._step % self._validation.every_n_steps == 0):
                result = self._validation.measure(self._engine)
                if progress is not None:
                    progress.after_validation(self._step, result)
            if is_last or is_stopped or self._step % config.checkpoint.every_n_steps == 0:
                path = self._save()
        self._writer.close()
        if progress is not None:
            progress.close()
        return TrainResult(step=self._step, is_finished=is_last, checkpoint=path)

    def _take_step(self, stop: threading.Event) -> tuple[StepMeasures, bool]:
        """Return what the next step measured, and whether any rank was told to stop."""
        config, began = self._config, time.perf_counter()
        self._step += 1
        batch = self._loader.batch(self._samples_consumed)
        data_wait_s = time.perf_counter() - began
        rate = learning_rate_of_step(config.optimizer, self._step, num_steps=config.num_steps)
        set_learning_rate(self._engine, rate)
        sums = sum(self._take_micro_step(batch, micro_step) for micro_step in range(self._num_micro_steps))
        assert isinstance(sums, torch.Tensor)
        self._samples_consumed += config.engine.global_batch_size
        told = torch.tensor([float(stop.is_set())], dtype=sums.dtype, device=sums.device)
        *values, stops = self._ranks.sum(torch.cat([sums, told])).tolist()
        means = [value / (self._num_micro_steps * self._ranks.world_size) for value in values]
        if not math.isfinite(means[0]):
            raise FloatingPointError(
                f"train step {self._step}: loss must be finite, got {means[0]}; lower optimizer.learning_rate or "
                f"raise optimizer.warmup_steps, then run again (it resumes before this step)"
            )
        window_size = config.model.window_size
        measures = StepMeasures(
            loss=means[0],
            loss_of_offset=means[1 : 1 + window_size],
            accuracy_of_offset=means[1 + window_size :],
            grad_norm=grad_norm(self._engine),
            step_s=time.perf_counter() - began,
            data_wait_s=data_wait_s,
        )
        return measures, stops > 0

    def _take_micro_step(self, batch: Batch, micro_step: int) -> torch.Tensor:
        """Return loss, losses and accuracies of the offsets of one forward and backward, float64."""
        config, step = self._config, self._step
        size = len(batch.labels_B) // self._num_micro_steps
        part = slice(micro_step * size, (micro_step + 1) * size)
        inputs = make_inputs(
            batch.codes_BT[part],
            batch.labels_B[part],
            batch.counters_B[part],
            config=config,
            step=step,
            label_dropout=config.model.label_dropout,
            device=self._ranks.device,
        )
        if uses_own_drafts(config, step=step):
            inputs = with_own_drafts(inputs, self._engine.module, config=config, step=step)
        torch.manual_seed(dropout_seed(config, step=step, micro_step=micro_step, rank=self._ranks.rank))
        logits_BTKV = self._engine(inputs.windows_BTK, inputs.labels_B)
        result = window_loss(logits_BTKV, inputs.codes_BT, offset_weights=config.noise.offset_weights)
        self._engine.backward(result.loss)
        self._engine.step()
        parts = [result.loss.detach()[None], result.loss_of_offset_K, result.accuracy_of_offset_K]
        return torch.cat(parts).double()

    def _save(self) -> str:
        self._writer.save(self._engine, RunState(step=self._step, samples_consumed=self._samples_consumed))
        return f"{self._config.run_dir}/{checkpoint_name(self._step)}"
