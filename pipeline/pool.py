"""A pool of Ray workers with a queue of our own: up to two work units for each worker that has started.

The invariant: a unit is in one place, waiting, in hand, done or poison, and only a worker that runs holds one; so a
cluster that is too small slows a job and cannot hang it. A dead worker is replaced and its units tried again, up to
`max_attempts` each; a lost node, or one without room for files on their way to S3, costs no attempt. Damaged input is
not tried again; while the storage fails one unit after the other the pool waits longer and longer, and in the end stops
with nothing set aside. This process holds O(units) and looks at each worker about twice a second.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from pipeline.cluster import check_own_node
from pipeline.config import TokenizeConfig
from pipeline.sources.plan import KeyFormat, WorkUnit
from pipeline.storage import ArtifactError, StagingFullError, StorageFullError, StorageUnavailableError
from pipeline.worker import Finished, UnitTokenizer

POLL_INTERVAL_S = 0.5
START_WARNING_INTERVAL_S = 60.0
UNITS_PER_WORKER = 2
"""One that encodes, and one that is committed or read ahead."""
NODE_LOST_SIGN = "its node has died"
OUTAGE_WAIT_S, MAX_OUTAGE_WAIT_S = 5.0, 120.0
"""Pause after the second unit in a row that its storage failed, and the longest; it doubles with each."""
MAX_LOSSES = 10
"""Lost nodes that a unit may have been on before it is suspect itself."""

logger = logging.getLogger(__name__)


def worker_environment(*, num_threads: int) -> dict[str, str]:
    """Return the environment variables of a process that runs a network.

    A network's activations are blocks of a few MB, which glibc by default maps afresh from the system each time: a
    tenth to a quarter of its time on a CPU goes into page faults. Kept, they cost at most 256 MiB of memory. OpenMP's
    idle threads wait without spinning, which would take the core of another process.
    """
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),  # older glibc ignores more
        "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    }


@dataclass(frozen=True, kw_only=True)
class Poison:
    """A unit that is not tried any more in this run, and what went wrong each time."""

    unit: WorkUnit
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PoolState:
    """What the pool is doing right now."""

    units_in_flight: tuple[str, ...]
    """Names of the units in the hands of workers."""
    num_read_in_flight: int
    """Samples read of them, as far as the workers said so."""
    num_workers: int
    """Workers that have started and may get units."""


class WorkerPool:
    """Workers, and the units that wait for them or are in their hands."""

    def __init__(self, config: TokenizeConfig, *, keys: KeyFormat, fingerprint_digest: str) -> None:
        """Prepare; `run` starts the workers.

        Args:
            config: the job.
            keys: how wide keys are.
            fingerprint_digest: of the tokenizer that every worker must load.
        """
        self._config, self._keys, self._digest = config, keys, fingerprint_digest
        self._actor_class: Any = ray.remote(UnitTokenizer).options(
            num_cpus=config.cluster.cpus_per_worker,
            num_gpus=config.cluster.gpus_per_worker,
            max_concurrency=UNITS_PER_WORKER + 1,  # and one to answer how far it is
            runtime_env={"env_vars": worker_environment(num_threads=max(1, int(config.cluster.cpus_per_worker)))},
        )
        self._waiting: deque[WorkUnit] = deque()
        self._starting: dict[Any, Any] = {}
        self._units_of: dict[Any, list[WorkUnit]] = {}  # in the hands of each started worker
        self._running: dict[Any, tuple[Any, WorkUnit]] = {}
        self._polls: dict[Any, Any] = {}
        self._num_read_of: dict[Any, int] = {}
        self._without_room: dict[Any, StagingFullError] = {}  # workers that get no more units, and why
        self._problems: defaultdict[int, list[str]] = defaultdict(list)
        self._deaths_with: Counter[int] = Counter()
        self._losses_with: Counter[int] = Counter()
        self._deaths_in_a_row = self._outages_in_a_row = self._num_killers = 0
        self._paused_until_s = 0.0
        self._last_problem = ""
        self._looked_s = self._warned_s = time.monotonic()

    def run(self, units: Iterable[WorkUnit]) -> Generator[Finished | Poison | PoolState, None, None]:
        """Yield each unit once, when it is committed or given up, and the state about twice a second.

        Closing the iterator ends the workers; what they have not committed is lost.

        Raises:
            ArtifactError: workers only die or do not start, the disk is full, or the storage fails every unit; no unit
                is to blame.
            ConnectionError: the node of an embedded session is dead.
        """
        self._waiting.extend(units)
        for _ in range(min(self._config.cluster.num_workers, len(self._waiting))):
            self._start_worker()
        try:
            while self._waiting or self._running:
                self._assign()
                for reference in self._wait():
                    yield from self._collect(reference)
                if time.monotonic() - self._looked_s >= POLL_INTERVAL_S:
                    self._looked_s = time.monotonic()
                    yield self._state()
                    self._warn_if_none_starts()
                self._check_workers_left()
            yield self._state()
        finally:  # in a joined cluster nobody else ends them
            for worker in [*self._units_of, *self._starting.values()]:
                ray.kill(worker)

    def _wait(self) -> list[Any]:
        """Return all that has come to its end, after a while at most."""
        references = [*self._running, *self._starting]
        if not references:  # a pause
            time.sleep(POLL_INTERVAL_S)
            return []
        if not ray.wait(references, timeout=POLL_INTERVAL_S)[0]:
            return []
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        return list(ready)

    def _start_worker(self) -> None:
        # Paths of the spec are relative to this process's directory, which a node that was joined does not start in.
        worker = self._actor_class.remote(
            self._config, keys=self._keys, fingerprint_digest=self._digest, directory=str(Path.cwd())
        )
        self._starting[worker.num_read.remote()] = worker

    def _assign(self) -> None:
        """Hand out units: one to each idle worker, then second ones while there are plenty for all.

        A unit that was in the hands of a worker when it died is suspect and gets a worker for itself.
        """
        if time.monotonic() < self._paused_until_s:
            return
        for num_held in range(UNITS_PER_WORKER):
            for worker, held in self._units_of.items():
                if len(held) != num_held or worker in self._without_room or not self._waiting:
                    continue
                is_suspect = self._waiting[0].unit_index in self._deaths_with
                if num_held and (
                    is_suspect
                    or len(self._waiting) < self._config.cluster.num_workers
                    or any(unit.unit_index in self._deaths_with for unit in held)
                ):
                    continue
                unit = self._waiting.popleft()
                held.append(unit)
                self._running[worker.run.remote(unit)] = (worker, unit)

    def _collect(self, reference: Any) -> Iterator[Finished | Poison]:
        """Take in the end of a worker's start or of a unit."""
        if reference in self._starting:
            self._collect_start(reference)
            return
        worker, unit = self._running.pop(reference)
        held = self._units_of.get(worker, [])
        was_alone = len(held) == 1
        with contextlib.suppress(ValueError):  # the worker is known to be gone
            held.remove(unit)
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            cause = getattr(error, "cause", error)
            if isinstance(cause, StagingFullError):
                logger.warning("unit %d (%s) goes to another worker: %s", unit.unit_index, unit.name, cause)
                self._without_room[worker] = cause
                self._waiting.append(unit)
                return
            if isinstance(cause, StorageFullError):
                raise cause from error  # every other unit would be encoded in vain
            if isinstance(cause, StorageUnavailableError):
                yield from self._retry_later(unit, cause)
                return
            yield from self._retry(unit, f"{type(cause).__name__}: {cause}", is_final=isinstance(cause, ArtifactError))
        except RayError as error:  # the worker is gone: killed, out of memory, or its machine lost
            self._last_problem = problem = f"its worker died: {_last_line(error)}"
            if worker in self._units_of:
                self._replace(worker)
            if self._is_node_lost(unit, error):
                logger.warning("unit %d (%s) is tried again: its node was lost", unit.unit_index, unit.name)
                self._waiting.append(unit)
                return
            self._deaths_with[unit.unit_index] += 1
            # Of two units in a dead worker either may be to blame: none is given up before it was alone in one. The
            # next to try it again, so that a verdict comes before other suspects add to the deaths in a row.
            for poison in self._retry(unit, problem, is_innocent=not was_alone, is_next=True):
                self._num_killers += 1
                if self._num_killers <= self._config.max_poison_units:
                    self._deaths_in_a_row = 0  # the unit's, not the workers'
                yield poison
        else:
            self._deaths_in_a_row = self._outages_in_a_row = 0
            self._deaths_with.pop(unit.unit_index, None)
            assert isinstance(result, Finished)
            yield result

    def _is_node_lost(self, unit: WorkUnit, error: RayError) -> bool:
        """Whether the machine of a worker is gone, or cannot be reached, which is no attempt of the unit's."""
        if not (isinstance(error, ActorUnavailableError) or NODE_LOST_SIGN in str(error)):
            return False
        self._losses_with[unit.unit_index] += 1
        return self._losses_with[unit.unit_index] <= MAX_LOSSES

    def _collect_start(self, reference: Any) -> None:
        worker = self._starting.pop(reference)
        try:
            ray.get(reference)
        except RayError as error:
            logger.warning("a worker did not start: %s", _last_line(error))
            self._last_problem = _last_line(error)
            self._replace(worker)
        else:
            self._units_of[worker] = []

    def _replace(self, worker: Any) -> None:
        ray.kill(worker)
        self._units_of.pop(worker, None)
        self._num_read_of.pop(worker, None)
        self._deaths_in_a_row += 1
        # Where workers only die no unit is to blame, and trying each of many would take days.
        if self._deaths_in_a_row < self._config.max_attempts * max(2, self._config.cluster.num_workers):
            self._start_worker()

    def _retry_later(self, unit: WorkUnit, cause: StorageUnavailableError) -> Iterator[Poison]:
        """Try a unit again that its storage failed; raise the error where it fails one unit after the other."""
        self._outages_in_a_row += 1
        is_alone = not (self._waiting or self._running)
        limit = self._config.max_attempts * max(2, self._config.cluster.num_workers)
        if self._outages_in_a_row >= limit and not is_alone:
            raise cause
        if self._outages_in_a_row > 1 or not self._waiting:
            wait_s = min(MAX_OUTAGE_WAIT_S, OUTAGE_WAIT_S * 2.0 ** max(0, self._outages_in_a_row - 2))
            logger.warning("tokenize %s: the storage fails; no new unit for %.0f s", self._config.run_dir, wait_s)
            self._paused_until_s = time.monotonic() + wait_s
        is_innocent = self._outages_in_a_row > 1 and not is_alone
        yield from self._retry(unit, f"{type(cause).__name__}: {cause}", is_innocent=is_innocent)

    def _retry(
        self,
        unit: WorkUnit,
        problem: str,
        *,
        is_final: bool = False,
        is_innocent: bool = False,
        is_next: bool = False,
    ) -> Iterator[Poison]:
        problems, limit = self._problems[unit.unit_index], self._config.max_attempts
        problems.append(problem)
        logger.warning(
            "unit %d (%s): attempt %d of %d failed: %s", unit.unit_index, unit.name, len(problems), limit, problem
        )
        if is_final or (len(problems) >= limit and not is_innocent):
            yield Poison(unit=unit, problems=tuple(problems))
        elif is_next:
            self._waiting.appendleft(unit)
        else:
            self._waiting.append(unit)

    def _check_workers_left(self) -> None:
        """Raise ArtifactError where every worker is gone and none will be started any more."""
        if self._waiting and not (self._units_of.keys() - self._without_room or self._starting or self._running):
            for error in self._without_room.values():
                raise error
            problem = self._last_problem or "no worker is left"
            raise ArtifactError(
                f"tokenize {self._config.run_dir}: workers must stay alive, got {self._deaths_in_a_row} deaths in a "
                f"row and {len(self._waiting)} units left: {problem}; mend the cause and rerun, finished units are kept"
            )

    def _state(self) -> PoolState:
        return PoolState(
            units_in_flight=tuple(unit.name for _, unit in self._running.values()),
            num_read_in_flight=self._poll(),
            num_workers=len(self._units_of.keys() - self._without_room),
        )

    def _poll(self) -> int:
        """Return the samples read of unfinished units, as far as the workers said so; waits for none."""
        polled = set(self._polls.values())
        for worker, held in self._units_of.items():
            if held and worker not in polled:
                self._polls[worker.num_read.remote()] = worker
        answered, _ = ray.wait(list(self._polls), num_returns=len(self._polls), timeout=0) if self._polls else ([], [])
        for reference in answered:
            worker = self._polls.pop(reference)
            with contextlib.suppress(RayError):  # it died; `_collect` sees to that
                self._num_read_of[worker] = ray.get(reference)
        return sum(self._num_read_of.get(worker, 0) for worker, held in self._units_of.items() if held)

    def _warn_if_none_starts(self) -> None:
        if self._units_of or not self._starting:
            return
        check_own_node(self._config.cluster)
        if time.monotonic() - self._warned_s < START_WARNING_INTERVAL_S:
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


def _last_line(error: RayError) -> str:
    """Return the end of a Ray error, where the cause stands after the traces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][-400:] if lines else type(error).__name__
