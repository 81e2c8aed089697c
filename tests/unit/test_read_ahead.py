"""Results are read ahead in one thread, by guessing the next positions; wrong guesses cost nothing but their start."""

import subprocess
import sys
import threading
import time

import pytest

from pipeline.read_ahead import ReadAhead


class Book:
    """Pages that are read slowly, or not at all until they may be."""

    def __init__(self) -> None:
        self.pages: list[int] = []
        self.may_turn = threading.Event()
        self.may_turn.set()

    def read(self, page: int) -> int:
        self.pages.append(page)
        assert self.may_turn.wait(10)
        if page < 0:
            raise ValueError(f"page {page}")
        return 10 * page


def wait_until_read(book: Book, count: int) -> None:
    deadline = time.monotonic() + 10
    while len(book.pages) < count and time.monotonic() < deadline:
        time.sleep(0.005)


def test_the_next_positions_are_read_before_they_are_asked_for() -> None:
    book = Book()
    ahead = ReadAhead(book.read, step=5, depth=2)
    assert ahead.take(0) == 0
    wait_until_read(book, 3)
    assert book.pages == [0, 5, 10]
    assert [ahead.take(page) for page in (5, 10, 15)] == [50, 100, 150]
    ahead.close()
    assert book.pages[:6] == [0, 5, 10, 15, 20, 25]


def test_wrong_guesses_are_dropped_before_they_are_read() -> None:
    book = Book()
    ahead = ReadAhead(book.read, step=1, depth=5)
    ahead.take(0)
    wait_until_read(book, 6)
    book.may_turn.clear()
    waiting = threading.Thread(target=ahead.take, args=(1,))  # one more guess, page 6, is held up
    waiting.start()
    wait_until_read(book, 7)
    waiting.join()
    jump = threading.Thread(target=ahead.take, args=(2,))
    jump.start()
    jump.join()  # page 7 waits behind page 6
    last = threading.Thread(target=ahead.take, args=(100,))
    last.start()
    time.sleep(0.05)
    book.may_turn.set()
    last.join()
    ahead.close()
    assert book.pages[:8] == [0, 1, 2, 3, 4, 5, 6, 100]


def test_an_error_comes_in_the_call_whose_result_it_is() -> None:
    ahead = ReadAhead(Book().read, step=-1, depth=3)
    assert ahead.take(1) == 10
    assert ahead.take(0) == 0
    with pytest.raises(ValueError, match="page -1"):
        ahead.take(-1)
    assert ahead.take(5) == 50
    ahead.close()


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    ahead = ReadAhead(Book().read, step=1, depth=2)
    ahead.take(0)
    ahead.close()
    assert threading.active_count() == before


def test_closing_waits_for_no_slow_read_and_neither_does_the_process() -> None:
    code = (
        "import threading, time\n"
        "from pipeline.read_ahead import ReadAhead\n"
        "is_at_it = threading.Event()\n"
        "def read(page):\n"
        "    if page:\n"
        "        is_at_it.set()\n"
        "        time.sleep(30)\n"
        "ahead = ReadAhead(read, step=1, depth=2)\n"
        "ahead.take(0)\n"
        "is_at_it.wait()\n"
        "began = time.monotonic()\n"
        "ahead.close()\n"
        "print(time.monotonic() - began)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=25)
    assert float(done.stdout) < 2
