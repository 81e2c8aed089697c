"""Results read ahead by a thread, addressed by position: the next ones are guessed, any other is read when asked for.

The invariant: all reading happens in the one thread, in the order it was asked for or guessed; an error comes in the
call whose result it is. What was guessed wrongly is dropped.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

CLOSE_WAIT_S = 0.5
"""What `close` gives a thread to end; one that waits for slow storage is a daemon and ends with the process."""

_Result = TypeVar("_Result")


class ReadAhead(Generic[_Result]):
    """Reads at `position`, and then at the next positions before they are asked for."""

    def __init__(self, read: Callable[[int], _Result], *, step: int, depth: int) -> None:
        """Start the thread; it reads nothing yet.

        Args:
            read: position -> result; called in the thread.
            step: distance of the positions that are guessed.
            depth: results that are read ahead, at least 1.
        """
        self._read, self._step, self._depth = read, step, depth
        self._futures: dict[int, Future[_Result]] = {}
        self._waiting: queue.SimpleQueue[tuple[int, Future[_Result]] | None] = queue.SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._read_waiting, name="batches", daemon=True)
        self._thread.start()

    def take(self, position: int) -> _Result:
        """Return the result at a position; raises what `read` raised for it."""
        assert not self._is_closed
        wanted = range(position, position + (self._depth + 1) * self._step, self._step)
        for guessed in self._futures.keys() - set(wanted):
            self._futures.pop(guessed).cancel()
        for coming in wanted:
            if coming not in self._futures:
                self._futures[coming] = Future()
                self._waiting.put((coming, self._futures[coming]))
        return self._futures.pop(position).result()

    def close(self) -> None:
        """End the thread after the read that it is at, and wait a moment for it."""
        self._is_closed = True
        for future in self._futures.values():
            future.cancel()
        self._futures.clear()
        self._waiting.put(None)
        self._thread.join(CLOSE_WAIT_S)

    def _read_waiting(self) -> None:
        while (asked := self._waiting.get()) is not None:
            position, future = asked
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._read(position))
                except BaseException as error:  # to whoever asks
                    future.set_exception(error)
