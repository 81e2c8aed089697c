"""Stopping a training run: the launcher's signals and a cluster's preemption notices, told to the ranks.

Invariant: being asked never interrupts a step. The first signal only sets an event; ranks look at theirs at the end of
each step, agree, take a checkpoint and return. The ranks wait for the launcher in one open call to an actor, so being
ready to stop costs nothing per step. A run that another job has taken over saves nothing more: its ranks are not told.
The only file that touches Ray's (alpha) preemption interface.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray

logger = logging.getLogger(__name__)

PREEMPTION_POLL_S = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_RANKS_AT_MOST = 100_000

ActorHandle = Any
"""Ray carries no types."""


class StopRequest:
    """Whether this process should stop: asked by SIGTERM or Ctrl-C (the second time at once), or its run was lost."""

    def __init__(self, is_lost: threading.Event) -> None:
        """Begin with no request.

        Args:
            is_lost: set when another job has taken the run over, before `is_made` is: then the ranks may not save.
        """
        self.is_made = threading.Event()
        self.is_lost = is_lost

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """Handle a first signal."""
        self.is_made.set()
        # The next one ends the process the usual way: KeyboardInterrupt, or death by SIGTERM.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        name = signal.Signals(number).name
        logger.warning("%s: the ranks take a checkpoint at the end of their step; once more stops at once", name)


@contextmanager
def stop_request(is_lost: threading.Event) -> Iterator[StopRequest]:
    """Listen to SIGTERM and Ctrl-C while the body runs; the handlers of before are put back.

    Args:
        is_lost: what `Storage.exclusive` of the run's directory gave.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in _SIGNALS} if is_main else {}
    request = StopRequest(is_lost)
    for number in before:
        signal.signal(number, request.on_signal)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Flag:
    """An actor that ranks wait at until the launcher raises it."""

    def __init__(self) -> None:
        self._is_raised = asyncio.Event()

    async def raise_flag(self) -> None:
        self._is_raised.set()

    async def wait(self) -> None:
        await self._is_raised.wait()


def start_flag() -> ActorHandle:
    """Return a new flag's actor, on this process's node: it lives and dies with the launcher's machine."""
    label = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    return ray.remote(num_cpus=0, max_concurrency=_RANKS_AT_MOST, label_selector=label)(_Flag).remote()


@contextmanager
def raised_on_request(flag: ActorHandle, request: StopRequest) -> Iterator[None]:
    """Raise the flag as soon as ranks are to save and stop, while the body runs; the flag's actor ends with it."""
    is_over = threading.Event()

    def forward() -> None:
        while not is_over.wait(0.05):
            if request.is_made.is_set() and not request.is_lost.is_set():
                flag.raise_flag.remote()
                return

    thread = threading.Thread(target=forward, name="forward-stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        if ray.is_initialized():  # else the run was ended from outside, and any call would start Ray again
            ray.kill(flag)


class RankStop:
    """Whether a rank should stop, and why; made in the rank, where two threads wait for the answer."""

    def __init__(self, flag: ActorHandle, *, watches_preemption: bool) -> None:
        """Begin to wait.

        Args:
            flag: what `start_flag` returned to the launcher.
            watches_preemption: whether to look for notices too; they exist on clusters only.
        """
        self._is_told = threading.Event()
        self._notices = _notices() if watches_preemption else None
        threading.Thread(target=self._wait_for, args=(flag,), name="wait-for-stop", daemon=True).start()
        if self._notices is not None:
            threading.Thread(target=self._watch_preemption, name="watch-preemption", daemon=True).start()

    def is_told(self) -> bool:
        """Return whether to stop at the end of this step; costs nothing, and other ranks may answer otherwise."""
        return self._is_told.is_set()

    def wait_until_told(self, timeout_s: float) -> None:
        """Return once this rank was told to stop, as all are: another may have been told first, and stopped it."""
        self._is_told.wait(timeout_s)

    @property
    def preempted_nodes(self) -> tuple[str, ...]:
        """Nodes that are about to be taken away, as far as this rank was told: another may have been told first."""
        notice = None if self._notices is None else self._notices.preemption_info
        return () if notice is None else tuple(notice.preempted_node_ids)

    def _wait_for(self, flag: ActorHandle) -> None:
        try:
            ray.get(flag.wait.remote())
        except ray.exceptions.RayError:
            return  # the launcher is gone or done, and with it this rank
        logger.info("stop: asked by the launcher")
        self._is_told.set()

    def _watch_preemption(self) -> None:
        while not (nodes := self.preempted_nodes):
            time.sleep(PREEMPTION_POLL_S)
        logger.warning("preemption: nodes %s will be taken away", ", ".join(nodes))
        self._is_told.set()


def _notices() -> Any | None:
    """Return where Ray Train puts the notice that it gives to every rank; none of a Ray that has no such place.

    Its public function is a barrier of all ranks, whose actor holds at most 1,000 calls: with more it never returns.
    """
    try:
        from ray.train.v2._internal.execution.context import (  # noqa: PLC0415  (heavy; the launcher sets variables first)
            get_train_context,
        )

        return get_train_context().preemption_context
    except (ImportError, AttributeError):
        logger.warning("preemption: this Ray cannot tell notices; a preempted node is like a lost one")
        return None
