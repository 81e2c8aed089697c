"""The shards of a set that are open just now, opened ahead of their use by threads.

The invariant: a shard that is asked for is opened at once, by the caller, unless a thread is at it already; so reading
ahead only ever saves time, and an error comes to the caller whose shard it is. The least recently used are closed
beyond `max_open`; arrays that views of them still hold stay valid.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from pipeline.read_ahead import CLOSE_WAIT_S
from pipeline.shards import ShardReader

NUM_THREADS = 4

logger = logging.getLogger(__name__)


class _Opening:
    """A shard that is open, being opened, or waiting for it."""

    def __init__(self, shard: int) -> None:
        self.shard = shard
        self.reader: Future[ShardReader] = Future()
        self._is_taken = False

    def take(self) -> bool:
        """Return whether the caller, who holds the lock, is the first to take it; only that one opens it."""
        was_taken, self._is_taken = self._is_taken, True
        return not was_taken


class OpenShards:
    """Open shards by number; any thread may ask."""

    def __init__(self, open_shard: Callable[[int], ShardReader], *, max_open: int) -> None:
        """Open nothing yet.

        Args:
            open_shard: opens one; called in any thread.
            max_open: shards that stay open.
        """
        self._open_shard, self._max_open = open_shard, max_open
        self._lock = threading.Lock()
        self._openings: OrderedDict[int, _Opening] = OrderedDict()
        self._waiting: queue.SimpleQueue[_Opening | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def expect(self, shards: Iterable[int]) -> None:
        """Begin to open shards that will be asked for soon, in this order; returns at once."""
        with self._lock:
            for shard in shards:
                if shard not in self._openings:
                    self._openings[shard] = _Opening(shard)
                    self._waiting.put(self._openings[shard])
                self._openings.move_to_end(shard)
            self._trim()
            while len(self._threads) < NUM_THREADS:
                # Daemons: a run that ends by an error does not wait for downloads that nobody will read.
                self._threads.append(threading.Thread(target=self._open_waiting, name="open-shards", daemon=True))
                self._threads[-1].start()

    def reader(self, shard: int) -> ShardReader:
        """Return a shard's reader, opening it first where no thread has begun to.

        Raises:
            ArtifactError: it cannot be opened; asking again tries again.
        """
        with self._lock:
            opening = self._openings.setdefault(shard, _Opening(shard))
            self._openings.move_to_end(shard)
            is_ours = opening.take()
            self._trim()
        if is_ours:
            self._open(opening)
        return opening.reader.result()

    def close(self) -> None:
        """Close all shards and end the threads, and wait a moment for them; a shard asked for later is opened again."""
        with self._lock:
            for opening in self._openings.values():
                opening.take()
            self._openings.clear()
            threads, self._threads = self._threads, []
        for _ in threads:
            self._waiting.put(None)
        deadline = time.monotonic() + CLOSE_WAIT_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _open_waiting(self) -> None:
        while (opening := self._waiting.get()) is not None:
            with self._lock:
                is_ours = opening.take()
            if is_ours:
                self._open(opening)

    def _open(self, opening: _Opening) -> None:
        """Open a shard that was taken; errors go into its future."""
        try:
            opening.reader.set_result(self._open_shard(opening.shard))
        except BaseException as error:  # to whoever asks; forgotten first, so that asking again tries again
            with self._lock, contextlib.suppress(KeyError):
                if self._openings[opening.shard] is opening:
                    del self._openings[opening.shard]
            opening.reader.set_exception(error)

    def _trim(self) -> None:
        while len(self._openings) > self._max_open:
            _, oldest = self._openings.popitem(last=False)
            oldest.take()  # so that no thread opens it any more
