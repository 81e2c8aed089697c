"""Ends a run in which a rank hangs, and names it: every rank says where it is, and each watches itself.

A collective that one rank never joins blocks all others, without a word. So every rank tells a store of rank 0's, from
a thread of its own, what it is doing; and where a phase does not end in time, its thread reads what the others say,
writes the verdict and its own stacks to its log, and ends the process with `EXIT_HUNG`, so that the launcher can
start the run again. The training thread pays for one assignment per phase; no clocks are compared.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch.distributed

from training.hang import Beat, describe_hang
from training.ranks import Ranks

logger = logging.getLogger(__name__)

EXIT_HUNG = 76
"""Exit code of a process that its watchdog ended; run it again."""

_MAX_INTERVAL_S = 5.0
_BEATS_PER_TIMEOUT = 20
_STORE_TIMEOUT = timedelta(seconds=60)
_LAST_WORDS_S = 10.0

T = TypeVar("T")
_Store = Any
"""A `torch.distributed.TCPStore`, which torch does not give types."""


@dataclass(frozen=True)
class _Position:
    """What the training thread is doing."""

    num_phases: int
    step: int
    phase: str
    since: float


class Watchdog:
    """Watches one rank; made on every rank at the same time."""

    def __init__(
        self, ranks: Ranks, *, timeout_s: float, log: Path, last_words: Callable[[], None] | None = None
    ) -> None:
        """Connect the ranks; called by every rank, which are watched from their first phase on.

        Args:
            ranks: of the run.
            timeout_s: longest that a phase may take.
            log: file that the verdict and the stacks are appended to.
            last_words: called before the process ends, for at most `_LAST_WORDS_S`.
        """
        self._rank, self._world_size = ranks.rank, ranks.world_size
        self._timeout_s, self._log, self._last_words = timeout_s, log, last_words
        self._interval_s = min(_MAX_INTERVAL_S, timeout_s / _BEATS_PER_TIMEOUT)
        self._position: _Position | None = None
        self._num_beats = 0
        self._closed, self._is_ending = threading.Event(), threading.Event()
        self._store = _connect(ranks)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()

    def enter(self, phase: str, *, step: int) -> None:
        """Note that the training thread begins a phase of a step; every rank goes through the same phases."""
        before = self._position
        self._position = _Position(1 if before is None else before.num_phases + 1, step, phase, time.monotonic())

    def close(self) -> None:
        """Stop watching; where the watchdog is ending the process (and the others' connections fail), let it."""
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=None if self._is_ending.is_set() else 1.0)

    def _beat(self) -> None:
        """Tell the store where this rank is, again and again: a process that is stopped cannot."""
        while not self._closed.wait(self._interval_s):
            position = self._position
            if self._store is None or position is None:
                continue
            self._num_beats += 1
            beat = Beat(
                num_beats=self._num_beats,
                num_phases=position.num_phases,
                step=position.step,
                phase=position.phase,
                phase_s=time.monotonic() - position.since,
            )
            try:
                self._store.set(_key(self._rank), json.dumps(asdict(beat)))
            except RuntimeError as error:
                if not self._closed.is_set():
                    logger.debug("heartbeat of rank %d: %s", self._rank, error)  # rank 0 has left, or this ends soon

    def _watch(self) -> None:
        while not self._closed.wait(self._interval_s):
            position = self._position
            if position is not None and time.monotonic() - position.since > self._timeout_s:
                self._end(position)

    def _end(self, position: _Position) -> NoReturn:
        """Say who hangs and end the process; without `logging`, whose locks the training thread may hold."""
        self._is_ending.set()
        with self._log.open("a", encoding="utf-8") as file:
            file.write(f"no end of step {position.step} ({position.phase}) in {self._timeout_s:g} s; all stacks:\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
            verdict = describe_hang(*self._hear_twice(), timeout_s=self._timeout_s)
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} ERROR {__name__} rank {self._rank} ends: {verdict}\n"
            file.write(line)
        os.write(2, line.encode())
        if self._last_words is not None:
            _answer_of(self._last_words, within_s=_LAST_WORDS_S)
        if self._rank == 0 and self._world_size > 1:
            time.sleep(4 * self._interval_s)  # the others may still be reading the store
        os._exit(EXIT_HUNG)

    def _hear_twice(self) -> tuple[Sequence[Beat | None], Sequence[Beat | None]]:
        """Return what every rank said last, and what it says three intervals later; None for what cannot be heard."""
        first = self._hear()
        time.sleep(3 * self._interval_s)
        return first, self._hear()

    def _hear(self) -> Sequence[Beat | None]:
        store, position, ranks = self._store, self._position, range(self._world_size)
        assert position is not None
        if store is None:
            self._num_beats += 1
            alone = Beat(self._num_beats, position.num_phases, position.step, position.phase, self._timeout_s)
            return [alone]
        keys = [_key(rank) for rank in ranks]
        answer = _answer_of(lambda: store.multi_get(keys), within_s=max(1.0, 2 * self._interval_s))
        return [None] * self._world_size if answer is None else [Beat(**json.loads(text)) for text in answer]


def _connect(ranks: Ranks) -> _Store | None:
    """Return the store that rank 0 holds; none for one rank, which has nobody to tell."""
    if ranks.world_size == 1:
        return None
    make: Any = torch.distributed.TCPStore  # type: ignore[attr-defined]
    host, options = os.environ["MASTER_ADDR"], {"timeout": _STORE_TIMEOUT, "wait_for_workers": False}
    if ranks.is_first:
        store = make(host, 0, is_master=True, **options)  # a free port
        ranks.from_first(store.port)
    else:
        store = make(host, ranks.from_first(None), is_master=False, **options)
    # Every rank can be heard from the start, also one that hangs before its first phase.
    silent = Beat(num_beats=0, num_phases=0, step=0, phase="start", phase_s=0.0)
    store.set(_key(ranks.rank), json.dumps(asdict(silent)))
    ranks.barrier()
    return store


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _answer_of(ask: Callable[[], T], *, within_s: float) -> T | None:
    """Return what `ask` returns; none where it fails or takes longer (a stopped process's sockets never answer)."""
    answers: list[T] = []

    def work() -> None:
        try:
            answers.append(ask())
        except Exception as error:
            logger.debug("last words: %s", error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout=within_s)
    return answers[0] if answers else None
