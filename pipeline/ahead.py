"""Work done ahead of a consumer, in order: a thread that reads, and threads that prepare what was read.

The invariant: results come in the order of the input, whatever the threads do, and an error comes at its place. Inputs
travel in groups, which keeps the cost of handing them over near a microsecond each; what is under way is bounded, so
a slow consumer stops the reader.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from itertools import islice
from typing import TypeVar

_Input = TypeVar("_Input")
_Result = TypeVar("_Result")

PUT_INTERVAL_S = 0.1


@contextlib.contextmanager
def prepared_ahead(
    inputs: Iterable[_Input],
    prepare: Callable[[list[_Input]], list[_Result]],
    *,
    threads: Executor,
    group_size: int,
    num_groups_ahead: int,
) -> Iterator[Iterator[_Result]]:
    """Yield an iterator over the results; leaving the context stops the reader.

    Args:
        inputs: read in a thread of their own, `group_size` at a time.
        prepare: a group of inputs -> their results; called in `threads`.
        threads: where groups are prepared.
        group_size: inputs per group.
        num_groups_ahead: groups that may be read or prepared and not consumed yet.
    """
    ready: queue.Queue[Future[list[_Result]] | None] = queue.Queue(maxsize=num_groups_ahead)
    stopped = threading.Event()

    def put(future: Future[list[_Result]] | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(future, timeout=PUT_INTERVAL_S)
                return

    def read() -> None:
        reader = iter(inputs)
        try:
            while not stopped.is_set() and (group := list(islice(reader, group_size))):
                put(threads.submit(prepare, group))
            put(None)
        except Exception as error:  # handed to the consumer
            failed: Future[list[_Result]] = Future()
            failed.set_exception(error)
            put(failed)

    thread = threading.Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        yield _results(ready)
    finally:
        stopped.set()
        thread.join()


def _results(ready: queue.Queue[Future[list[_Result]] | None]) -> Iterator[_Result]:
    while (future := ready.get()) is not None:
        yield from future.result()
