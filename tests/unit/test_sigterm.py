"""SIGTERM: an exception of whoever asked for one, and nobody else's, also where Ray took it while it started."""

import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import pytest

from pipeline.sigterm import TerminatedError, kept_sigterm, raised_on_sigterm


@pytest.fixture
def came() -> Iterator[list[int]]:
    """Signals that a listener of before, which only takes note, has got."""
    numbers: list[int] = []

    def listen(number: int, _: FrameType | None) -> None:
        numbers.append(number)

    before = signal.signal(signal.SIGTERM, listen)
    yield numbers
    assert signal.signal(signal.SIGTERM, before) is listen


def start_ray(*, comes: bool = False) -> None:
    """Catch the signal as `ray.init` does, and send it where it is to come meanwhile."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
    if comes:
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_is_raised_in_the_body_and_no_error_that_code_may_catch(came: list[int]) -> None:
    with pytest.raises(TerminatedError) as caught, raised_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert not isinstance(caught.value, Exception)
    assert came == []


def wait_as_ray_does() -> None:
    """Turn what a handler raises into a plain KeyboardInterrupt, as `ray.wait` does."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None


def test_sigterm_where_ray_waits_is_still_told_from_ctrl_c() -> None:
    with pytest.raises(TerminatedError), raised_on_sigterm():
        wait_as_ray_does()
    with pytest.raises(KeyboardInterrupt) as caught, raised_on_sigterm():
        raise KeyboardInterrupt  # as Python does at Ctrl-C, which a process in the background may be started to ignore
    assert not isinstance(caught.value, TerminatedError)


def test_what_starts_ray_leaves_sigterm_with_its_listener(came: list[int]) -> None:
    with kept_sigterm():
        start_ray()
    os.kill(os.getpid(), signal.SIGTERM)
    assert came == [signal.SIGTERM]


def test_sigterm_while_ray_starts_is_told_to_its_listener_and_ends_the_start(came: list[int]) -> None:
    with pytest.raises(TerminatedError), kept_sigterm():
        start_ray(comes=True)
    assert came == [signal.SIGTERM]
