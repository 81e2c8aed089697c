"""Starts the ranks of a training run: under Ray Train (embedded or on a cluster), or as one of torchrun's processes.

Invariant: what fails in a rank fails the launch, with that rank's error text; what finished is never turned into a
failure (gloo may abort a process while it exits, so torchrun's processes leave by `os._exit`). Ray Train gives
placement, rendezvous and supervision; our checkpoints alone say where to go on, nothing of Ray's storage is kept.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import ray

from pipeline.cluster import ray_session
from pipeline.config import ClusterConfig
from pipeline.local_storage import LocalStorage, exclusive, local_path
from training.checkpoint import checkpoint_name, newest_whole_checkpoint
from training.config import TrainConfig
from training.follow import follow_metrics
from training.loop import TrainResult, train

if TYPE_CHECKING:
    from ray.train import ScalingConfig

logger = logging.getLogger(__name__)

EXIT_STOPPED = 75
"""Exit code of a torchrun process that SIGTERM ended after a checkpoint (EX_TEMPFAIL: run it again)."""


class LaunchError(RuntimeError):
    """The ranks of a run could not be started, or one of them failed."""


def launch_training(config: TrainConfig, *, progress: bool = True) -> TrainResult:
    """Run a training job to its end and return how it ended.

    Under `cluster.launcher: torchrun` this process is one rank, and it exits here: 0, or 75 after SIGTERM.

    Args:
        config: of the run.
        progress: whether to show live progress (Ray only; torchrun's rank 0 logs).

    Raises:
        LaunchError: a rank failed; the message holds its error.
        ArtifactError: the run's checkpoints are all damaged, or another job works in its run_dir.
    """
    run_dir = local_path(config.run_dir).resolve()
    if config.cluster.launcher == "torchrun":
        with exclusive(run_dir) if os.environ.get("RANK") == "0" else nullcontext():
            _exit_as_rank(train(config))
    with exclusive(run_dir):
        finished = newest_whole_checkpoint(LocalStorage(run_dir))
        if finished is not None and finished.step >= config.num_steps:
            logger.info("run %s is finished: step=%d", run_dir, finished.step)
            return _result(run_dir, finished.step)
        with ray_session(config.cluster):
            if config.cluster.address == "local":
                check_gpus(config.cluster, num_gpus=ray.cluster_resources().get("GPU", 0.0))
            fit = _Fit(config, run_dir=run_dir)
            if progress:
                follow_metrics(config, until=fit.is_over)
            fit.wait()
        finished = newest_whole_checkpoint(LocalStorage(run_dir))
    if finished is None or finished.step < config.num_steps:
        raise LaunchError(f"train {run_dir}: the ranks ended before step {config.num_steps}; see {run_dir}/logs")
    return _result(run_dir, finished.step)


def _result(run_dir: Path, step: int) -> TrainResult:
    return TrainResult(step=step, is_finished=True, checkpoint=f"{run_dir}/{checkpoint_name(step)}")


def worker_variables(config: ClusterConfig) -> dict[str, str]:
    """Return the environment variables of a rank under Ray."""
    variables = {
        # Idle OpenMP threads that spin would take the core that another rank computes on.
        "OMP_NUM_THREADS": str(max(1, int(config.cpus_per_worker))),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    }
    if config.gpus_per_worker == 0:
        variables["DS_ACCELERATOR"] = "cpu"
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


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


def _exit_as_rank(result: TrainResult) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if result.is_finished else EXIT_STOPPED)


class _Fit:
    """Ray Train at work, in a thread: in the main one it would take Ctrl-C for itself and keep it."""

    def __init__(self, config: TrainConfig, *, run_dir: Path) -> None:
        self._config, self._run_dir = config, run_dir
        self._error: BaseException | None = None
        self.is_over = threading.Event()
        threading.Thread(target=self._run, name="ray-train", daemon=True).start()

    def wait(self) -> None:
        """Return when all ranks have ended; raises LaunchError if one failed."""
        self.is_over.wait()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            _fit(self._config, run_dir=self._run_dir)
        except BaseException as error:  # raised again by `wait`
            self._error = error
        finally:
            self.is_over.set()


def _fit(config: TrainConfig, *, run_dir: Path) -> None:
    """Run every rank to its end under Ray Train V2."""
    # Ray Train reads these when it is imported. A failed rank is noticed in 0.2 s instead of 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    if config.cluster.address == "local":
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    from ray.train import FailureConfig, RunConfig  # noqa: PLC0415  (heavy, and see above)
    from ray.train.torch import TorchConfig, TorchTrainer  # noqa: PLC0415
    from ray.train.v2.api.exceptions import TrainingFailedError  # noqa: PLC0415

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    storage = run_dir / "ray"
    trainer = TorchTrainer(
        _train_as_worker,
        train_loop_config={"spec": config.model_dump_json(), "directory": str(Path.cwd())},
        torch_config=TorchConfig(backend="nccl" if config.cluster.gpus_per_worker else "gloo"),
        scaling_config=_scaling(config.cluster),
        run_config=RunConfig(
            name=f"launch-{secrets.token_hex(4)}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": worker_variables(config.cluster)},
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise LaunchError(_describe_failure(error, run_dir=run_dir)) from error
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _scaling(cluster: ClusterConfig) -> ScalingConfig:
    from ray.train import ScalingConfig  # noqa: PLC0415  (as in `_fit`)

    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return ScalingConfig(
        num_workers=cluster.num_workers, use_gpu=cluster.gpus_per_worker > 0, resources_per_worker=resources
    )


def _train_as_worker(settings: dict[str, Any]) -> None:
    """What Ray runs in every worker; paths of the spec are relative to the launcher's directory, as everywhere."""
    if Path(settings["directory"]).is_dir():
        os.chdir(settings["directory"])
    train(TrainConfig.model_validate_json(settings["spec"]))


def _describe_failure(error: Exception, *, run_dir: Path) -> str:
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    if not failures:
        return f"train {run_dir}: Ray Train failed: {' '.join(str(error).split())}"
    # When a rank dies the others lose their connections to it; the cause is what did not.
    rank = min(failures, key=lambda rank: ("onnection" in str(failures[rank]), rank))
    cause = f"{type(failures[rank]).__name__}: {failures[rank]}"
    return f"train {run_dir}: rank {rank} failed: {cause}; see {run_dir}/logs/rank_{rank:05d}.log"
