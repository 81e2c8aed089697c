"""Results read ahead by a thread, addressed by position: the next ones are guessed, any other is read when asked for.

The invariant: all reading happens in the one thread, in the order it was asked for or guessed; an error comes in the
call whose result it is. What was guessed wrongly is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

_Result = TypeVar("_Result")


class ReadAhead(Generic[_Result]):
    """Reads at `position`, and then at the next positions before they are asked for."""

    def __init__(self, read: Callable[[int], _Result], *, step: int, depth: int) -> None:
        """Start nothing yet.

        Args:
            read: position -> result; called in the thread.
            step: distance of the positions that are guessed.
            depth: results that are read ahead, at least 1.
        """
        self._read, self._step, self._depth = read, step, depth
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._futures: dict[int, Future[_Result]] = {}

    def take(self, position: int) -> _Result:
        """Return the result at a position; raises what `read` raised for it."""
        wanted = range(position, position + (self._depth + 1) * self._step, self._step)
        for guessed in self._futures.keys() - set(wanted):
            self._futures.pop(guessed).cancel()
        for coming in wanted:
            if coming not in self._futures:
                self._futures[coming] = self._thread.submit(self._read, coming)
        return self._futures.pop(position).result()

    def close(self) -> None:
        """End the thread after the read that it is at."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._futures.clear()
