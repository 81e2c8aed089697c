"""A pool of Ray workers with a queue of our own: one work unit at a time for each worker that has started.

The invariant: a unit is in one place, waiting, in hand, done or failed, and only a worker that runs holds one; so a
cluster that is too small slows a job and cannot hang it. A dead worker is replaced and its unit tried again. Damaged
input is not tried again. This process holds O(units) and looks at each worker about twice a second.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.config import TokenizeConfig
from pipeline.ledger import LedgerRecord
from pipeline.progress import LiveProgress
from pipeline.sources.plan import Plan, WorkUnit
from pipeline.storage import ArtifactError
from pipeline.worker import UnitTokenizer

POLL_INTERVAL_S = 0.5
START_WARNING_INTERVAL_S = 60.0
MAX_NAMED_UNITS = 3

logger = logging.getLogger(__name__)


class WorkerPool:
    """Workers, and the units that wait for them or are in their hands."""

    def __init__(self, config: TokenizeConfig, *, the_plan: Plan, fingerprint_digest: str, live: LiveProgress) -> None:
        """Prepare; `run` starts the workers.

        Args:
            config: the job.
            the_plan: where units and keys come from.
            fingerprint_digest: of the tokenizer that every worker must load.
            live: told about every finished unit.
        """
        self._config, self._plan, self._digest, self._live = config, the_plan, fingerprint_digest, live
        num_threads = str(max(1, int(config.cluster.cpus_per_worker)))
        self._actor_class: Any = ray.remote(UnitTokenizer).options(
            num_cpus=config.cluster.cpus_per_worker,
            num_gpus=config.cluster.gpus_per_worker,
            max_concurrency=2,  # one for the unit, one to answer how far it is
            runtime_env={"env_vars": {"OMP_NUM_THREADS": num_threads, "OMP_WAIT_POLICY": "PASSIVE"}},
        )
        self._waiting: deque[WorkUnit] = deque()
        self._starting: dict[Any, Any] = {}
        self._idle: deque[Any] = deque()
        self._running: dict[Any, tuple[Any, WorkUnit]] = {}
        self._polls: dict[Any, Any] = {}
        self._num_read_of: dict[Any, int] = {}
        self._attempts: Counter[int] = Counter()
        self._failures: dict[int, str] = {}
        self._deaths_in_a_row = 0
        self._warned_s = time.monotonic()

    def run(self, units: list[WorkUnit]) -> dict[int, LedgerRecord]:
        """Return the record of each unit, by unit index.

        Raises:
            ArtifactError: some units failed; all others are committed.
        """
        self._waiting.extend(units)
        records: dict[int, LedgerRecord] = {}
        for _ in range(min(self._config.cluster.num_workers, len(units))):
            self._start_worker()
        try:
            while self._waiting or self._running:
                self._assign()
                ready, _ = ray.wait([*self._running, *self._starting], timeout=POLL_INTERVAL_S)
                for reference in ready:
                    record = self._collect(reference)
                    if record is not None:
                        records[record.unit_index] = record
                        self._live.add_unit(record.counts)
                num_workers = len(self._idle) + len(self._running)
                self._live.show(num_read_in_flight=self._poll(), num_workers=num_workers)
                self._warn_if_none_starts()
        finally:  # in a joined cluster nobody else ends them
            workers = [worker for worker, _ in self._running.values()]
            for worker in [*workers, *self._idle, *self._starting.values()]:
                ray.kill(worker)
        self._raise_failures()
        return records

    def _start_worker(self) -> None:
        worker = self._actor_class.remote(self._config, keys=self._plan.keys, fingerprint_digest=self._digest)
        self._starting[worker.num_read.remote()] = worker

    def _assign(self) -> None:
        while self._waiting and self._idle:
            worker, unit = self._idle.popleft(), self._waiting.popleft()
            self._attempts[unit.unit_index] += 1
            self._running[worker.run.remote(unit)] = (worker, unit)

    def _collect(self, reference: Any) -> LedgerRecord | None:
        """Take in the end of a worker's start or of a unit; return the record if the unit was finished."""
        worker, unit = self._running.pop(reference, None) or (self._starting.pop(reference), None)
        self._num_read_of.pop(worker, None)
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            cause = getattr(error, "cause", error)
            self._idle.append(worker)
            assert unit is not None, "only units raise"
            self._retry(unit, f"{type(cause).__name__}: {cause}", is_final=isinstance(cause, ArtifactError))
        except RayError as error:  # the worker is gone: killed, out of memory, its machine lost, or not able to start
            self._replace(worker, unit, problem=f"its worker died: {_last_line(error)}")
        else:
            self._idle.append(worker)
            if unit is not None:
                self._deaths_in_a_row = 0
                assert isinstance(result, LedgerRecord)
                return result
        return None

    def _replace(self, worker: Any, unit: WorkUnit | None, *, problem: str) -> None:
        ray.kill(worker)
        self._deaths_in_a_row += 1
        if unit is None:
            logger.warning("a worker did not start: %s", problem)
        else:
            self._retry(unit, problem)
        # Where workers only die no unit is to blame, and trying each of many would take days.
        if self._deaths_in_a_row < self._config.max_attempts * max(2, self._config.cluster.num_workers):
            self._start_worker()
        elif not self._starting and not self._idle and not self._running:
            self._failures.update({left.unit_index: f"not tried any more, {problem}" for left in self._waiting})
            self._waiting.clear()

    def _retry(self, unit: WorkUnit, problem: str, *, is_final: bool = False) -> None:
        attempt, limit = self._attempts[unit.unit_index], self._config.max_attempts
        logger.warning("unit %d (%s): attempt %d of %d failed: %s", unit.unit_index, unit.name, attempt, limit, problem)
        if is_final or attempt >= limit:
            self._failures[unit.unit_index] = problem
        else:
            self._waiting.append(unit)

    def _poll(self) -> int:
        """Return the samples read of unfinished units, as far as the workers said so; waits for none."""
        polled = set(self._polls.values())
        for worker, _ in self._running.values():
            if worker not in polled:
                self._polls[worker.num_read.remote()] = worker
        answered, _ = ray.wait(list(self._polls), num_returns=len(self._polls), timeout=0) if self._polls else ([], [])
        for reference in answered:
            worker = self._polls.pop(reference)
            try:
                self._num_read_of[worker] = ray.get(reference)
            except RayError:
                self._num_read_of.pop(worker, None)  # it died; `_collect` sees to that
        return sum(self._num_read_of.get(worker, 0) for worker, _ in self._running.values())

    def _warn_if_none_starts(self) -> None:
        if self._running or not self._starting or time.monotonic() - self._warned_s < START_WARNING_INTERVAL_S:
            return
        self._warned_s = time.monotonic()
        logger.warning(
            "tokenize %s: no worker of %d has started yet, each asks for %g CPUs and %g GPUs; the cluster has %s free",
            self._config.run_dir,
            len(self._starting),
            self._config.cluster.cpus_per_worker,
            self._config.cluster.gpus_per_worker,
            {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")},
        )

    def _raise_failures(self) -> None:
        if not self._failures:
            return
        named = [
            f"unit {unit_index} ({self._plan.units[unit_index].name}): {problem}"
            for unit_index, problem in sorted(self._failures.items())[:MAX_NAMED_UNITS]
        ]
        raise ArtifactError(
            f"tokenize {self._config.run_dir}: every unit must finish, got {len(self._failures)} of "
            f"{len(self._plan.units)} failed: {'; '.join(named)}; mend the cause and rerun, finished units are kept"
        )


def _last_line(error: RayError) -> str:
    """Return the end of a Ray error, where the cause stands after the traces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][-400:] if lines else type(error).__name__
