"""Local directories for files on their way to S3: gone after their upload, and after the process that made them.

The invariant: a living process holds a lock (`flock`) on its directory, which the kernel frees with the process; so a
later run on the machine removes what a killed one left, and never what a living one needs: its driver at the start, a
worker on another machine before it stages its first file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PREFIX = "tensorar-stage-"
YOUNG_S = 60.0
"""A directory so young may not have its lock yet."""


@contextlib.contextmanager
def staging_directory() -> Iterator[Path]:
    """Yield a new, locked directory below TMPDIR; it is removed on any exit."""
    _remove_dead_once(os.getpid())
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as directory, _locked(Path(directory)):
        yield Path(directory)


def remove_dead_directories() -> int:
    """Remove the staging directories of killed processes of this machine and return how many there were."""
    num_removed = 0
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        # Gone in between, of another user, or locked by a living process: then it is not ours to remove.
        with contextlib.suppress(OSError):
            if time.time() - directory.stat().st_mtime > YOUNG_S:
                with _locked(directory):
                    shutil.rmtree(directory)
                num_removed += 1
    return num_removed


@cache
def _remove_dead_once(process_id: int) -> None:
    remove_dead_directories()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory; an `OSError` where another process does."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
