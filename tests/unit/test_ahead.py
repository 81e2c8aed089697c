"""Work ahead of a consumer: in order whatever the threads do, errors at their place, bounded, and stopped with it."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest

from pipeline.ahead import prepared_ahead


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def squares(inputs: Iterator[int], threads: ThreadPoolExecutor) -> AbstractContextManager[Iterator[int]]:
    def prepare(group: list[int]) -> list[int]:
        time.sleep(0.01 * (3 - group[0] % 4))  # later groups are done first
        return [number**2 for number in group]

    return prepared_ahead(inputs, prepare, threads=threads, group_size=2, num_groups_ahead=3)


@pytest.mark.parametrize("number", [0, 1, 2, 3, 20, 21])
def test_results_come_in_the_order_of_the_input(threads: ThreadPoolExecutor, number: int) -> None:
    with squares(iter(range(number)), threads) as results:
        assert list(results) == [index**2 for index in range(number)]


def test_an_error_of_the_reader_comes_after_what_was_read_before_it(threads: ThreadPoolExecutor) -> None:
    def failing() -> Iterator[int]:
        yield from range(4)
        raise OSError("disk gone")

    seen = []
    with squares(failing(), threads) as results, pytest.raises(OSError, match="disk gone"):  # noqa: PT012
        for result in results:
            seen.append(result)
    assert seen == [0, 1, 4, 9]


def test_an_error_in_a_thread_is_raised_at_its_place(threads: ThreadPoolExecutor) -> None:
    def prepare(group: list[int]) -> list[float]:
        return [1 / number for number in group]

    numbers = [2, 4, 0, 8]
    with prepared_ahead(numbers, prepare, threads=threads, group_size=1, num_groups_ahead=2) as results:
        assert [next(results), next(results)] == [0.5, 0.25]
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_reading_stays_a_bounded_way_ahead_and_stops_with_the_consumer(threads: ThreadPoolExecutor) -> None:
    read: list[int] = []

    def endless() -> Iterator[int]:
        while True:
            read.append(len(read))
            yield len(read)

    num_threads = threading.active_count()
    with squares(endless(), threads) as results:
        next(results)
        time.sleep(0.5)
        assert len(read) <= 2 * (1 + 3 + 1)  # the group at hand, those that are ready, and one that waits for a place
    assert "read-ahead" not in {thread.name for thread in threading.enumerate()}
    assert threading.active_count() <= num_threads + 4
