"""The training loop: shards of codes in, checkpoints and metrics out; needs only torchrun's environment variables.

Invariant: losses are a pure function of (shards, spec, world size): every draw is counter-based and the loader's
position is one integer, so a run that is killed anywhere and started again goes on bit for bit. A finished run started
again returns at once. SIGTERM (where the main thread runs this), or whatever `should_stop` listens to, ends the run
after a checkpoint.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from pipeline.config import S3Config
from pipeline.loader import Batch, Loader
from pipeline.shard_set import ShardSet
from training.alike import check_alike
from training.checkpoint import CheckpointRecord, RunState, checkpoint_name, set_record
from training.config import TrainConfig
from training.data import open_shards
from training.engine import Engine, build_engine
from training.metrics import rank_log
from training.ops import check_ops
from training.progress import Progress, StepCosts, StepMeasures
from training.ranks import Ranks, join_ranks, leave_ranks
from training.resume import find_checkpoint, resume_engine
from training.run_files import RunFiles
from training.saver import CheckpointWriter
from training.skipped import SkippedSteps
from training.step import StepOutcome, Stepper
from training.tensorar import TensorAR, build_model
from training.validation import Validation
from training.wandb_board import WandbBoard, check_wandb
from training.watchdog import Watchdog
from training.weights import warm_start

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a call of `train` ended."""

    step: int
    """Steps that the run has taken in all."""
    is_finished: bool
    """Whether it has taken `num_steps`; False after a request to stop."""
    checkpoint: str
    """Path or URL of the newest checkpoint."""


def train(config: TrainConfig, *, should_stop: Callable[[], bool] | None = None) -> TrainResult:
    """Train, or go on training, until `num_steps`; called by every rank.

    Args:
        config: of the run; `config.cluster` is not looked at.
        should_stop: asked once per step on every rank; where one says yes, as after SIGTERM, all save and return.

    Returns:
        The same on every rank.

    Raises:
        ArtifactError: the shards or the checkpoints do not allow the run; the message says what to do.
        ValueError: the environment or the spec does not fit the world size, a package is missing, or a rank has another
            spec, code, package or shard set than rank 0.
        NativeOpError: the spec asks for the native ops, and there are none.
        FloatingPointError: more than `max_skipped_steps` steps were not finite.
    """
    check_wandb(config)
    if config.engine.ops == "native":
        check_ops(with_cuda=torch.cuda.is_available())
    ranks = join_ranks(step_timeout_s=config.engine.step_timeout_s)
    with (
        closing(RunFiles(config, rank=ranks.rank)) as files,
        rank_log(files.directory, rank=ranks.rank),
        _stop_on_sigterm(should_stop) as is_told_to_stop,
    ):
        logger.info("rank=%d of %d host=%s pid=%d", ranks.rank, ranks.world_size, socket.gethostname(), os.getpid())
        shard_sets, held_out = open_shards(config)
        check_alike(config, shard_sets=shard_sets if held_out is None else [*shard_sets, held_out], ranks=ranks)
        record = find_checkpoint(
            config,
            ranks=ranks,
            fingerprint=shard_sets[0].fingerprint,
            training_sets=[set_record(shard_set.manifest) for shard_set in shard_sets],
        )
        if record is not None and record.step >= config.num_steps:
            logger.info("run %s is finished: step=%d", config.run_dir, record.step)
            result = _result(config, record.step)
        else:
            engine = _prepare_engine(config, ranks=ranks, record=record)
            with closing(_watchdog(config, ranks=ranks, files=files)) as watchdog:
                stepper = Stepper(config, engine=engine, ranks=ranks, watchdog=watchdog)
                run = _Run(config, stepper, shard_sets=shard_sets, held_out=held_out, files=files, record=record)
                result = run.train(is_told_to_stop)
        leave_ranks(ranks)
    return result


def _prepare_engine(config: TrainConfig, *, ranks: Ranks, record: CheckpointRecord | None) -> Engine:
    torch.manual_seed(config.seed)
    model = build_model(config.model)
    if config.engine.ops == "native":
        model.use_native_ops()
    if record is None and config.warm_start is not None:
        warm_start_on_first(model, config.warm_start, s3=config.s3, ranks=ranks)
    engine = build_engine(model, config=config, ranks=ranks)
    if record is not None:
        resume_engine(engine, config=config, record=record)
    return engine


def warm_start_on_first(model: TensorAR, path: str, *, s3: S3Config, ranks: Ranks) -> None:
    """Copy weights into rank 0's model, which `build_engine` gives to all ranks: a thousand need not read one file.

    Raises:
        Exception: what `warm_start` raises on rank 0, on every rank.
    """
    error: Exception | None = None
    if ranks.is_first:
        logger.info("warm start from %s", path)
        try:
            warm_start(model, path, s3=s3)
        except Exception as found:  # of any kind: the other ranks would wait for rank 0
            error = found
    error = ranks.from_first(error)
    if error is not None:
        raise error


def _watchdog(config: TrainConfig, *, ranks: Ranks, files: RunFiles) -> Watchdog:
    timeout_s = config.engine.step_timeout_s
    return Watchdog(ranks, timeout_s=timeout_s, log=files.log, last_words=files.publish_log)


def _result(config: TrainConfig, step: int) -> TrainResult:
    path = f"{config.run_dir}/{checkpoint_name(step)}"
    return TrainResult(step=step, is_finished=step >= config.num_steps, checkpoint=path)


@contextmanager
def _stop_on_sigterm(should_stop: Callable[[], bool] | None) -> Iterator[Callable[[], bool]]:
    """Yield what tells whether SIGTERM has come or `should_stop` says so."""
    has_come = threading.Event()

    def is_told_to_stop() -> bool:
        return has_come.is_set() or (should_stop is not None and should_stop())

    if threading.current_thread() is not threading.main_thread():
        yield is_told_to_stop  # under Ray Train, whose launcher listens for the ranks
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: has_come.set())
    try:
        yield is_told_to_stop
    finally:
        signal.signal(signal.SIGTERM, previous)


class _Run:
    """One process's part in a run, from its first step to its last."""

    def __init__(
        self,
        config: TrainConfig,
        stepper: Stepper,
        *,
        shard_sets: Sequence[ShardSet],
        held_out: ShardSet | None,
        files: RunFiles,
        record: CheckpointRecord | None,
    ) -> None:
        self._config, self._stepper, self._files = config, stepper, files
        ranks = stepper.ranks
        state = RunState(step=0, samples_consumed=0) if record is None else record.state
        self._step, self._samples_consumed = state.step, state.samples_consumed
        self._num_replaced = state.num_replaced_samples
        self._loader = Loader(
            shard_sets,
            config=config.data,
            global_batch_size=config.engine.global_batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            num_classes=config.model.num_classes,
        )
        self._validation = None if held_out is None else Validation(held_out, config=config, ranks=ranks)
        self._writer = CheckpointWriter(
            config,
            ranks=ranks,
            fingerprint=shard_sets[0].fingerprint,
            training_sets=[set_record(shard_set.manifest) for shard_set in shard_sets],
        )
        if ranks.is_first:
            files.bring_records(step=state.step)
        self._skipped = SkippedSteps(
            config, ranks=ranks, directory=files.directory, step=state.step, count=state.num_skipped_steps
        )
        self._progress = _progress(config, ranks=ranks, files=files, step=state.step) if ranks.is_first else None

    def train(self, is_told_to_stop: Callable[[], bool]) -> TrainResult:
        """Return how the run ended: at `num_steps`, or after the checkpoint that a request to stop led to."""
        config = self._config
        is_last = is_stopped = False
        try:
            while not (is_last or is_stopped):
                is_stopped = self._take_step(is_told_to_stop)
                self._writer.prepare(self._stepper.engine)
                is_last = self._step == config.num_steps
                self._validate(is_due=is_last)
                if is_last or is_stopped or self._step % config.checkpoint.every_n_steps == 0:
                    self._save()
        except FloatingPointError:
            self._writer.close()  # every rank is here, so that the save under way can end
            raise
        finally:
            self._close()
        self._stepper.watchdog.enter("commit", step=self._step)
        self._writer.close()
        return _result(config, self._step)

    def _take_step(self, is_told_to_stop: Callable[[], bool]) -> bool:
        """Take the next step and return whether any rank was told to stop."""
        began = time.perf_counter()
        self._step += 1
        self._stepper.watchdog.enter("data", step=self._step)
        batch = self._loader.batch(self._samples_consumed)
        data_wait_s = time.perf_counter() - began
        outcome = self._stepper.take(
            batch,
            step=self._step,
            num_skipped_steps=self._skipped.count,
            data_wait_s=data_wait_s,
            is_told_to_stop=is_told_to_stop(),
        )
        self._samples_consumed += self._config.engine.global_batch_size
        self._num_replaced += outcome.num_replaced
        if outcome.is_skipped:
            self._skip(batch, outcome)
        if self._progress is not None:
            measures = StepMeasures(
                loss=outcome.loss,
                loss_of_offset=outcome.loss_of_offset,
                accuracy_of_offset=outcome.accuracy_of_offset,
                grad_norm=outcome.grad_norm,
                num_skipped_steps=self._skipped.count,
                num_replaced_samples=self._num_replaced,
            )
            costs = StepCosts(step_s=time.perf_counter() - began, data_wait_s=outcome.data_wait_s)
            self._progress.after_step(self._step, measures, costs)
        return outcome.is_stopped

    def _skip(self, batch: Batch, outcome: StepOutcome) -> None:
        def sample_names() -> list[str]:
            names = self._loader.sample_names(batch)
            # Where the loss is finite and only the norm is not, any sample may be the cause.
            return names if math.isfinite(outcome.loss) else [names[index] for index in outcome.suspects_B]

        self._skipped.add(self._step, loss=outcome.loss, grad_norm=outcome.grad_norm, sample_names=sample_names)

    def _validate(self, *, is_due: bool) -> None:
        """Measure the raw weights, on the last step and every few; an average (`ema_decay`) is not measured."""
        validation = self._validation
        if validation is None or not (is_due or self._step % validation.every_n_steps == 0):
            return
        on_batch = partial(self._stepper.watchdog.enter, "validation", step=self._step)
        result = validation.measure(self._stepper.engine, on_batch=on_batch)
        if self._progress is not None:
            self._progress.after_validation(self._step, result)

    def _save(self) -> None:
        """Save a checkpoint; the metrics up to it are in the run's storage before it is."""
        self._stepper.watchdog.enter("save", step=self._step)
        self._files.publish_records()
        state = RunState(
            step=self._step,
            samples_consumed=self._samples_consumed,
            num_skipped_steps=self._skipped.count,
            num_replaced_samples=self._num_replaced,
        )
        stall_s = self._writer.save(self._stepper.engine, state)
        if self._progress is not None:
            self._progress.after_save(stall_s)
        self._files.publish()

    def _close(self) -> None:
        self._loader.close()
        if self._progress is not None:
            self._progress.close()
        self._skipped.close()


def _progress(config: TrainConfig, *, ranks: Ranks, files: RunFiles, step: int) -> Progress:
    boards = [] if config.wandb_project is None else [WandbBoard(config, directory=files.directory)]
    return Progress(config, ranks=ranks, directory=files.directory, step=step, boards=boards)
