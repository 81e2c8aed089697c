"""SIGTERM as an exception of the main thread, and kept with whoever listens to it while Ray starts.

The invariant: SIGTERM ends a command as Ctrl-C does, by an exception that no `except Exception` holds up; training,
which may not be interrupted in a step, has its own handler. Ray takes the signal for itself when it starts, and its
native handler would end this process by SIGABRT.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class TerminatedError(KeyboardInterrupt):
    """SIGTERM came."""


class Sigterm:
    """Whether SIGTERM has come: Python drops what is raised in a finalizer, and a signal may come in one."""

    def __init__(self) -> None:
        self._has_come = False

    def check(self) -> None:
        """Raise TerminatedError if it has."""
        if self._has_come:
            raise TerminatedError

    def _on_signal(self, _number: int, _: FrameType | None) -> None:
        self._has_come = True
        self.check()


@contextlib.contextmanager
def raised_on_sigterm() -> Iterator[Sigterm]:
    """Raise TerminatedError when SIGTERM comes while the body runs; the handler of before is put back."""
    sigterm = Sigterm()
    with _put_back():
        if _is_main_thread():
            signal.signal(signal.SIGTERM, sigterm._on_signal)
        try:
            yield sigterm
        except KeyboardInterrupt:
            sigterm.check()  # where Ray waits, it makes a plain one of what a handler raises
            raise


@contextlib.contextmanager
def kept_sigterm() -> Iterator[None]:
    """Leave SIGTERM with whoever listens to it, through a body that starts Ray.

    Raises:
        TerminatedError: it came meanwhile, which Ray answers by SystemExit; whoever listens has been told.
    """
    with _put_back():
        try:
            yield
            return
        except SystemExit as error:
            ended = error
    if _is_main_thread():
        signal.raise_signal(signal.SIGTERM)
    raise TerminatedError from ended


@contextlib.contextmanager
def _put_back() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if _is_main_thread():  # no other may set handlers
            signal.signal(signal.SIGTERM, before)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
