"""A file that the kernel lets nobody but root read, seen as one who is not root."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

NOBODY = 65534


@contextlib.contextmanager
def forbidden(path: Path) -> Iterator[None]:
    """Take all rights to a file below the working directory away while the body runs; root becomes nobody."""
    user, mode = os.geteuid(), path.stat().st_mode
    Path.cwd().chmod(0o755)  # paths from here on need no rights to the directories above
    path.chmod(0)
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(mode)
