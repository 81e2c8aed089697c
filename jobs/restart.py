"""Keeps a training run going: ranks that die are started again from the newest checkpoint, with fewer if need be.

Invariant: the global batch never changes. Only numbers of ranks that divide it are chosen, between
`cluster.min_workers` and `cluster.num_workers`; accumulation follows. What would fail again is not tried again.
Restarts in a row without a new checkpoint are counted against `cluster.max_failures`, so that a run which gets on is
never given up and one which does not is. Ray's own scheduler says whether there is room, by a trial reservation.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from jobs.ray_ranks import Outcome, RanksFailedError, resources_per_rank, run_ranks
from jobs.stopping import StopRequest
from pipeline.cluster import check_own_node
from pipeline.config import ClusterConfig
from pipeline.storage import ArtifactError, open_storage
from training.checkpoint import newest_record
from training.config import TrainConfig

logger = logging.getLogger(__name__)

RESTARTS = "restarts.jsonl"
_POLL_S = 0.5
_TRIAL_S = 3.0


def run_to_the_end(config: TrainConfig, *, stop: StopRequest) -> Outcome | None:
    """Run the ranks, again and again where that may help, inside a Ray session.

    Returns:
        How the last ranks ended: finished, or stopped, on request or before nodes were taken away that nothing
        replaces; None where the request came before there were any, or ended them before they could save.

    Raises:
        RanksFailedError: a rank failed for good, or too often without a new checkpoint.
        ConnectionError: the node of an embedded session is dead.
    """
    count = RestartCount(config)
    outcome: Outcome | None = None
    while True:
        # After a preemption all is saved, and somebody may have better use for what is left of the cluster.
        num_ranks = find_room(config, stop=stop, is_patient=outcome is None)
        if num_ranks is None:
            return outcome
        count.note_start(num_ranks)
        try:
            outcome = run_ranks(config_of_ranks(config, num_ranks), stop=stop)
        except RanksFailedError as error:
            if stop.is_made.is_set() and error.is_worth_retrying:
                return None  # whoever stops a job may stop all of its processes; the newest checkpoint is there
            count.note_failure(error)
            outcome = None
        else:
            if outcome.result.is_finished or not outcome.preempted_nodes:
                return outcome
            count.note_preemption(outcome)


def possible_ranks(config: TrainConfig) -> tuple[int, ...]:
    """Return the numbers of ranks that a run may have, largest first: those that divide its global batch."""
    cluster = config.cluster
    least = cluster.num_workers if cluster.min_workers is None else min(cluster.min_workers, cluster.num_workers)
    unit = config.engine.micro_batch_size or 1
    numbers = range(cluster.num_workers, least - 1, -1)
    return tuple(number for number in numbers if config.engine.global_batch_size % (unit * number) == 0)


def config_of_ranks(config: TrainConfig, num_ranks: int) -> TrainConfig:
    """Return the config of the same run on `num_ranks` ranks; fewer ranks take more micro steps, not more memory.

    Args:
        config: of the run.
        num_ranks: one of `possible_ranks`.
    """
    if num_ranks == config.cluster.num_workers:
        return config
    micro_batch_size = config.engine.micro_batch_size
    if micro_batch_size is None:
        samples_per_rank = config.engine.global_batch_size // num_ranks
        at_most = config.engine.global_batch_size // config.cluster.num_workers
        micro_batch_size = max(size for size in range(1, at_most + 1) if samples_per_rank % size == 0)
    spec = config.model_dump()
    spec["engine"]["micro_batch_size"] = micro_batch_size
    spec["cluster"] |= {"num_workers": num_ranks, "min_workers": None}
    return TrainConfig.model_validate(spec)


def find_room(config: TrainConfig, *, stop: StopRequest, is_patient: bool) -> int | None:
    """Return the number of ranks that the cluster has room for now; waits for it, as long as it takes.

    The largest possible number gets `cluster.node_wait_s`, so that a lost node can come back or be replaced (the
    waiting reservation tells an autoscaler); then the smaller ones are tried.

    Args:
        config: of the run.
        stop: once made, the wait ends.
        is_patient: False gives up after the first round.

    Returns:
        None where `stop` was made or patience ended.
    """
    numbers = possible_ranks(config)
    while not stop.is_made.is_set():
        for number in numbers:
            wait_s = config.cluster.node_wait_s if number == numbers[0] else _TRIAL_S
            if _has_room(config.cluster, number, wait_s=wait_s, stop=stop):
                return number
        if not is_patient:
            return None
        if stop.is_made.is_set():
            break
        logger.warning(
            "train %s: the cluster has no room for %s ranks; waiting for nodes", config.run_dir, _told(numbers)
        )
    return None


def _told(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[-1]} to {numbers[0]}"


def _has_room(cluster: ClusterConfig, num_ranks: int, *, wait_s: float, stop: StopRequest) -> bool:
    """Whether the ranks' resources can be reserved within `wait_s`; they are given back."""
    reservation = placement_group([resources_per_rank(cluster)] * num_ranks)
    until = time.monotonic() + wait_s
    try:
        while not reservation.wait(_POLL_S):
            check_own_node(cluster)
            if stop.is_made.is_set() or time.monotonic() > until:
                return False
        return not stop.is_made.is_set()
    finally:
        if ray.is_initialized():  # else the run was ended from outside, and any call would start Ray again
            remove_placement_group(reservation)


class RestartCount:
    """Counts restarts, and says and records each of them."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._storage = open_storage(config.run_dir, s3=config.s3)
        self._num_in_a_row = 0
        self._num_restarts = 0
        self._newest_step = -1
        self._cause: dict[str, Any] | None = None
        self._unrecorded = b""

    def note_start(self, num_ranks: int) -> None:
        """Say with how many ranks, and from where, a restart goes on; the first start needs no words."""
        from_step = newest_step(self._config)
        # A storage that does not answer says 0, and what it has later must not pass for a new checkpoint.
        self._newest_step = max(self._newest_step, from_step)
        if self._cause is None:
            return
        self._num_restarts += 1
        line = self._cause | {"from_step": from_step, "num_ranks": num_ranks}
        logger.warning(
            "restart %d after %s: goes on from step %d with %d of %d ranks "
            "(%d in a row without a new checkpoint, at most %d)",
            *(self._num_restarts, line["cause"], from_step, num_ranks, self._config.cluster.num_workers),
            *(self._num_in_a_row, self._config.cluster.max_failures),
        )
        self._record({"time": datetime.now(UTC).isoformat(timespec="seconds")} | line)

    def _record(self, line: dict[str, Any]) -> None:
        """Add a line to the record where the run is; one that cannot be added is with the next one."""
        self._unrecorded += json.dumps(line).encode() + b"\n"
        try:
            recorded = b"" if self._storage.find(RESTARTS) is None else self._storage.read_bytes(RESTARTS)
            self._storage.write_bytes(RESTARTS, recorded + self._unrecorded)
        except (ArtifactError, OSError) as error:
            logger.warning("restarts.jsonl lacks this restart: %s; the next one records both", error)
        else:
            self._unrecorded = b""

    def note_failure(self, error: RanksFailedError) -> None:
        """Count a failure; return if the ranks may be started again.

        Raises:
            RanksFailedError: they may not.
        """
        if not error.is_worth_retrying:
            raise error
        has_got_on = newest_step(self._config) > self._newest_step
        self._num_in_a_row = (0 if has_got_on else self._num_in_a_row) + (0 if error.is_preemption else 1)
        self._cause = {"cause": str(error), "rank": error.rank, "failures_in_a_row": self._num_in_a_row}
        logger.warning("%s", error)
        if self._num_in_a_row > self._config.cluster.max_failures:
            raise self._last(error)

    def _last(self, error: RanksFailedError) -> RanksFailedError:
        """The same error, as the last of several that no new checkpoint parts."""
        num_restarts = self._num_in_a_row - 1
        if num_restarts == 0:
            return error
        cause = f"{error.cause}; {num_restarts} restarts in a row made no new checkpoint (cluster.max_failures)"
        return RanksFailedError(cause, rank=error.rank, is_worth_retrying=False, is_preemption=False)

    def note_preemption(self, outcome: Outcome) -> None:
        """Take note that ranks stopped in good order because nodes go."""
        self._num_in_a_row = 0
        cause = f"nodes {', '.join(outcome.preempted_nodes)} are taken away, all was saved"
        self._cause = {"cause": cause, "rank": None, "failures_in_a_row": 0}


def newest_step(config: TrainConfig) -> int:
    """Return the step of a run's newest checkpoint whose record can be read, its files unverified; 0 without one."""
    try:
        record = newest_record(open_storage(config.run_dir, s3=config.s3))
    except ArtifactError:
        return 0  # the ranks say what is wrong with them
    return 0 if record is None else record.step
