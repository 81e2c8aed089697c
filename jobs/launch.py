"""Starts the ranks of a training run: under Ray Train (embedded or on a cluster), or as one of torchrun's processes.

Invariant: what fails in a rank fails the launch, with that rank's error text; what finished is never turned into a
failure (gloo may abort a process while it exits, so torchrun's processes leave by `os._exit`). Our checkpoints alone
say where to go on. Ray gives placement and supervision; what to do about a failure is decided in `jobs.restart`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from contextlib import nullcontext
from typing import NoReturn

import ray

from jobs.inputs import check_inputs
from jobs.ray_ranks import Outcome, RanksFailedError
from jobs.restart import newest_step, run_to_the_end
from jobs.run import EXIT_STOPPED, RunStoppedError
from jobs.stopping import StopRequest, stop_request
from pipeline.cluster import ray_session
from pipeline.config import ClusterConfig
from pipeline.storage import Storage, open_storage
from training.checkpoint import checkpoint_name, newest_whole_checkpoint
from training.config import TrainConfig
from training.follow import follow_metrics
from training.loop import TrainResult, train
from training.run_dir import local_run_dir

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.2


class LaunchError(RuntimeError):
    """The ranks of a run could not be started, or one of them failed."""


def launch_training(config: TrainConfig, *, progress: bool = True) -> TrainResult:
    """Run a training job to its end and return how it ended.

    Under `cluster.launcher: torchrun` this process is one rank, and it exits here: 0, or 75 after SIGTERM.

    Args:
        config: of the run.
        progress: whether to show live progress (Ray only; torchrun's rank 0 logs).

    Raises:
        LaunchError: a rank failed for good, and the message holds its error; or another job has taken the run over.
        RunStoppedError: SIGTERM, Ctrl-C or a preemption ended the run after a checkpoint.
        ArtifactError: the inputs do not fit, the checkpoints are all damaged, or another job works in the run_dir.
    """
    storage = open_storage(config.run_dir, s3=config.s3)
    if config.cluster.launcher == "torchrun":
        _stop_with_torchrun()
        with storage.exclusive() if os.environ.get("RANK") == "0" else nullcontext(threading.Event()) as is_lost:
            threading.Thread(target=_leave_when, args=(is_lost, config), name="watch-lock", daemon=True).start()
            _exit_as_rank(train(config))
    with storage.exclusive() as is_lost, stop_request(is_lost) as stop:
        finished = _finished(config, storage)
        if finished is not None:
            logger.info("run %s is finished: step=%d", storage, finished.step)
            return finished
        check_inputs(config, is_new=newest_step(config) == 0)
        outcome = _run_under_ray(config, stop=stop, progress=progress)
    if outcome is None or not outcome.result.is_finished:
        raise RunStoppedError(_told_of_stop(config, outcome))
    return outcome.result


def _stop_with_torchrun() -> None:
    """Have the kernel send SIGTERM when torchrun is gone: killed, it leaves its ranks at work, which hold the run."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def check_gpus(cluster: ClusterConfig, *, num_gpus: float) -> None:
    """Check that the ranks of an embedded session find their GPUs: Ray would wait for more of them for ever.

    Raises:
        LaunchError: this machine has fewer.
    """
    needed = cluster.num_workers * cluster.gpus_per_worker
    if needed > num_gpus:
        raise LaunchError(
            f"start {cluster.num_workers} ranks: cluster.num_workers * cluster.gpus_per_worker must be at most this "
            f"machine's {num_gpus:g} GPUs, got {needed:g}; lower one of them, or join a cluster with cluster.address"
        )


def _finished(config: TrainConfig, storage: Storage) -> TrainResult | None:
    """The result of a run that has nothing left to do; its checkpoint is verified only where its step says so."""
    if newest_step(config) < config.num_steps:
        return None
    record = newest_whole_checkpoint(storage)
    if record is None or record.step < config.num_steps:
        return None
    url = storage.url_of(checkpoint_name(record.step))
    return TrainResult(step=record.step, is_finished=True, checkpoint=url)


def _run_under_ray(config: TrainConfig, *, stop: StopRequest, progress: bool) -> Outcome | None:
    with ray_session(config.cluster):
        if config.cluster.address == "local":
            check_gpus(config.cluster, num_gpus=ray.cluster_resources().get("GPU", 0.0))
        run = _Run(config, stop=stop)
        if progress:
            follow_metrics(config, until=run.is_over)
        try:
            return run.wait()
        except RanksFailedError as error:
            raise LaunchError(f"train {config.run_dir}: {error}; see {_log(config, error.rank)}") from error


class _Run:
    """The run at work, in a thread: in the main one Ray Train would take Ctrl-C for itself and keep it."""

    def __init__(self, config: TrainConfig, *, stop: StopRequest) -> None:
        self._config, self._stop = config, stop
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None
        self.is_over = threading.Event()
        threading.Thread(target=self._run, name="ray-train", daemon=True).start()
        threading.Thread(target=self._watch_lock, name="watch-lock", daemon=True).start()

    def wait(self) -> Outcome | None:
        """Return how the run ended; raises what it raised."""
        self.is_over.wait()
        if self._stop.is_lost.is_set():
            raise LaunchError(_told_of_loss(self._config))  # leaving the Ray session ends the ranks
        if self._error is not None:
            raise self._error
        return self._outcome

    def _run(self) -> None:
        try:
            self._outcome = run_to_the_end(self._config, stop=self._stop)
        except BaseException as error:  # raised again by `wait`
            self._error = error
        finally:
            self.is_over.set()

    def _watch_lock(self) -> None:
        """End the run as soon as another job has taken it over."""
        while not self.is_over.wait(_POLL_S):
            if self._stop.is_lost.is_set():
                self._stop.is_made.set()  # no ranks are started again
                self.is_over.set()


def _log(config: TrainConfig, rank: int | None) -> str:
    logs = local_run_dir(config.run_dir) / "logs"
    return str(logs if rank is None else logs / f"rank_{rank:05d}.log")


def _told_of_stop(config: TrainConfig, outcome: Outcome | None) -> str:
    step = newest_step(config) if outcome is None else outcome.result.step
    nodes = () if outcome is None else outcome.preempted_nodes
    why = f" because nodes {', '.join(nodes)} are taken away" if nodes else ""
    return f"train {config.run_dir}: stopped at step {step} of {config.num_steps}{why}; run it again to go on"


def _told_of_loss(config: TrainConfig) -> str:
    return (
        f"train {config.run_dir}: one job at a time may write here, and another job has taken over {config.run_dir} "
        "while this one did not renew its lock; this one ends and saves nothing more, leave the run to that one"
    )


def _leave_when(is_lost: threading.Event, config: TrainConfig) -> None:
    """End this rank when its job has lost the run: torchrun then ends the others, which cannot save without it."""
    is_lost.wait()
    logger.error("%s", _told_of_loss(config))
    logging.shutdown()
    os._exit(1)


def _exit_as_rank(result: TrainResult) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if result.is_finished else EXIT_STOPPED)
