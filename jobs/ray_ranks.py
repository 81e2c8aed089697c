"""One start of the ranks under Ray Train V2, from placement to their last word.

Invariant: Ray Train's own retries are all off: whoever calls `run_ranks` decides what is tried again. What a rank's
error was survives: among the errors that a dying rank causes in the others, the cause is found. Nothing of Ray's
storage is kept; it lies in local scratch. The only file that spells Ray Train's settings.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from jobs.stopping import RankStop, StopRequest, raised_on_request, start_flag
from pipeline.config import ClusterConfig
from pipeline.pool import worker_environment
from pipeline.storage import ArtifactError, StorageUnavailableError
from training.config import TrainConfig
from training.loop import TrainResult, train
from training.ops import NativeOpError
from training.ranks import collective_timeout

if TYPE_CHECKING:
    from ray.train import ScalingConfig

_OF_THE_MACHINE = ("RayActorError", "ActorDiedError", "WorkerHealthCheckFailedError", "WorkerHealthCheckTimeoutError")
_OF_THE_START = ("WorkerGroupStartupFailedError", "WorkerGroupStartupTimeoutError")
_SIGNS_OF_A_LOST_PEER = ("onnection", "gloo", "NCCL", "ncclUnhandled", "store")
_SIGNS_OF_DEATH = tuple(
    re.compile(sign) for sign in (r"\bpid[:=] ?(\d+)", r"\bip[:=] ?'?([\d.a-f:]+)", r"exit detail: (.*?)\. (?:[A-Z]|$)")
)
"""Of the process, its node's address, and Ray's word on what happened."""
_HEALTH_CHECKS_PER_S = 500
_TOLD_WAIT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How ranks that did not fail ended."""

    result: TrainResult
    preempted_nodes: tuple[str, ...]
    """Ray's ids of the nodes whose notice stopped them; empty otherwise."""


class RanksFailedError(RuntimeError):
    """A rank failed, or the ranks could not be started."""

    def __init__(self, cause: str, *, rank: int | None, is_worth_retrying: bool, is_preemption: bool) -> None:
        """Keep what failed.

        Args:
            cause: one line.
            rank: that failed first, as far as can be told; none where it was no rank.
            is_worth_retrying: False for errors that would come again: of the spec, the artifacts, the code.
            is_preemption: whether a node was taken away after a notice.
        """
        super().__init__(cause if rank is None else f"rank {rank} failed: {cause}")
        self.cause, self.rank = cause, rank
        self.is_worth_retrying, self.is_preemption = is_worth_retrying, is_preemption


def run_ranks(config: TrainConfig, *, stop: StopRequest) -> Outcome:
    """Run `cluster.num_workers` ranks until they end, inside a Ray session.

    Args:
        config: of the run; its engine's batch divides over that many ranks.
        stop: once made, the ranks take a checkpoint and end.

    Raises:
        RanksFailedError: one failed.
    """
    _set_variables(num_ranks=config.cluster.num_workers)
    # Ray Train reads the variables just set when it is imported.
    from ray.train import FailureConfig, RunConfig  # noqa: PLC0415
    from ray.train.torch import TorchConfig, TorchTrainer  # noqa: PLC0415
    from ray.train.v2.api.exceptions import TrainingFailedError  # noqa: PLC0415

    from jobs.ray_cleaner import watch_own_session  # noqa: PLC0415

    watch_own_session()
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    scratch = tempfile.mkdtemp(prefix="tensorar-ray-train-")
    flag = start_flag()
    trainer = TorchTrainer(
        _train_as_worker,
        train_loop_config={"spec": config.model_dump_json(), "directory": str(Path.cwd()), "flag": flag},
        torch_config=TorchConfig(
            backend="nccl" if config.cluster.gpus_per_worker else "gloo",
            timeout_s=int(collective_timeout(config.engine.step_timeout_s).total_seconds()),
        ),
        scaling_config=_scaling(config.cluster),
        run_config=RunConfig(
            name=f"launch-{secrets.token_hex(4)}",
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            worker_runtime_env={"env_vars": worker_variables(config.cluster)},
        ),
    )
    try:
        with raised_on_request(flag, stop):
            outcome: Outcome = trainer.fit().return_value
    except TrainingFailedError as error:
        raise describe_failure(error) from error
    except ray.exceptions.ActorDiedError as error:
        cause = f"the controller of the ranks died: {_told(error)}"
        raise RanksFailedError(cause, rank=None, is_worth_retrying=True, is_preemption=False) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return outcome


def worker_variables(config: ClusterConfig) -> dict[str, str]:
    """Return the environment variables of a rank under Ray."""
    variables = worker_environment(num_threads=max(1, int(config.cpus_per_worker)))
    variables |= {"GOMP_SPINCOUNT": "0", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
    if config.gpus_per_worker == 0:
        variables["DS_ACCELERATOR"] = "cpu"
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def resources_per_rank(config: ClusterConfig) -> dict[str, float]:
    """Return what Ray sets aside for a rank."""
    resources = {"CPU": config.cpus_per_worker}
    return resources | {"GPU": config.gpus_per_worker} if config.gpus_per_worker else resources


def describe_failure(error: Exception) -> RanksFailedError:
    """Return what one of Ray Train's errors says: which rank failed first, of what, and whether it may pass."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    if not failures:
        cause = getattr(error, "controller_failure", error)
        is_preemption = hasattr(error, "preemption_info")
        return RanksFailedError(
            f"Ray Train failed: {_one_line(cause)}",
            rank=None,
            is_worth_retrying=is_preemption or type(cause).__name__ in _OF_THE_START,
            is_preemption=is_preemption,
        )
    # When a rank dies the others lose their connections to it; the cause is what did not.
    rank = min(failures, key=lambda rank: (_suspicion(failures[rank]), rank))
    is_only_seen = _suspicion(failures[rank]) == 2  # the lost one has not been noticed yet
    cause = _told(failures[rank])
    return RanksFailedError(
        f"another rank, or its node, was lost: rank {rank} saw {cause}" if is_only_seen else cause,
        rank=None if is_only_seen else rank,
        is_worth_retrying=all(is_worth_retrying(failure) for failure in failures.values()),
        is_preemption=any(_is_of_preemption(failure) for failure in failures.values()),
    )


def is_worth_retrying(error: Exception) -> bool:
    """Return whether an error of a rank may be gone the next time: its process or node died, a device or a peer failed.

    What the spec, the artifacts or the code cause comes again: their errors do not pass. A storage's failure may.
    """
    if type(error).__name__ in _OF_THE_MACHINE or isinstance(error, StorageUnavailableError):
        return True
    if isinstance(error, ArtifactError | NativeOpError | NotImplementedError | RecursionError):
        return False
    # Torch raises RuntimeError (and subclasses of it) for lost peers, timeouts and device faults.
    return isinstance(error, RuntimeError | ConnectionError | TimeoutError)


def _suspicion(error: Exception) -> int:
    """0 for what surely is a cause, 2 for what a lost peer leaves behind."""
    if not is_worth_retrying(error):
        return 0
    if type(error).__name__ in _OF_THE_MACHINE:
        return 1
    return 2 if any(sign in str(error) for sign in _SIGNS_OF_A_LOST_PEER) else 1


def _told(error: Exception) -> str:
    """The error in one line; of Ray's paragraphs about a dead process, what happened to which."""
    text = _one_line(error)
    if type(error).__name__ not in _OF_THE_MACHINE:
        return f"{type(error).__name__}: {text}"
    pid, address, detail = (found[1] if (found := sign.search(text)) else "unknown" for sign in _SIGNS_OF_DEATH)
    if "node" in detail or "node has died" in text:
        return f"its node {address} was lost ({detail})"
    return f"its process {pid} on {address} died ({detail}); out of memory, if nobody killed it"


def _is_of_preemption(error: Exception) -> bool:
    return bool(getattr(getattr(error, "health_check_failure", error), "preempted", False))


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def health_check_interval_s(num_ranks: int) -> float:
    """Return how often Ray Train asks every rank for its state; its controller takes in some 2,400 answers a second.

    A failed rank of a few is noticed in 0.2 s, of 1,024 in 2 s, as by Ray's own default.
    """
    return max(0.2, num_ranks / _HEALTH_CHECKS_PER_S)


def _set_variables(*, num_ranks: int) -> None:
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", f"{health_check_interval_s(num_ranks):g}")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")


def _scaling(cluster: ClusterConfig) -> ScalingConfig:
    from ray.train import ScalingConfig  # noqa: PLC0415  (as in `run_ranks`)

    return ScalingConfig(
        num_workers=cluster.num_workers,
        use_gpu=cluster.gpus_per_worker > 0,
        resources_per_worker=resources_per_rank(cluster),
    )


def _train_as_worker(settings: dict[str, Any]) -> Outcome:
    """What Ray runs in every worker; paths of the spec are relative to the launcher's directory, as everywhere."""
    if Path(settings["directory"]).is_dir():
        os.chdir(settings["directory"])
    config = TrainConfig.model_validate_json(settings["spec"])
    stop = RankStop(settings["flag"], watches_preemption=config.cluster.address != "local")
    result = train(config, should_stop=stop.is_told)
    if not result.is_finished:
        stop.wait_until_told(_TOLD_WAIT_S)  # the launcher has to know why
    return Outcome(result=result, preempted_nodes=stop.preempted_nodes)
