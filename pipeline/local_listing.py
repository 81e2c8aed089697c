"""What lies below a local directory, without hidden files (staged ones, the lock) and with links followed.

The invariant: nothing is left out without a word. A link to nothing is an error, and one that leads back to a directory
above it, which would list all of that again, a warning. A listing of a part is that part of the whole listing.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from pipeline.storage import ArtifactError

NOTHING_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
"""What a path that leads to nothing fails with: a file that is gone, or a link to none."""
Above = frozenset[tuple[int, int]]
"""Directories on the way down, as (device, inode)."""

logger = logging.getLogger(__name__)


def scan(root: Path, *, folder: str, start: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Yield the name below `root` and the status of each file below a folder of it, in any order.

    Args:
        root: a directory; one that is missing holds nothing.
        folder: below it, "" for the root itself.
        start: what the names right in the folder must start with.

    Raises:
        ArtifactError: a link leads to nothing.
        OSError: a directory cannot be listed.
    """
    above = _above(root, folder)
    if above is not None:
        yield from _scan(root / folder, prefix=f"{folder}/" if folder else "", start=start, above=above)


def folders_in(root: Path) -> Iterator[str]:
    """Yield the names of the folders right below `root` that `scan` enters, in any order; raises as it does."""
    for entry, status in _entries(root, start="", above=_above(root, "") or Above()):
        if stat.S_ISDIR(status.st_mode):
            yield entry.name


def _above(root: Path, folder: str) -> Above | None:
    """Return (device, inode) of the root and of all folders down to `folder`; None where there is no way down.

    A folder that leads back up is no way down, so that a listing of a part is that part of the whole listing.
    """
    path, above = root, Above()
    for name in ("", *filter(None, folder.split("/"))):
        path = path / name
        try:
            status = path.stat()
        except OSError as error:
            if error.errno not in NOTHING_THERE:
                raise
            return None
        if _leads_back(str(path), status, above=above):
            return None
        above |= {_identity(status)}
    return above


def _scan(directory: Path, *, prefix: str, start: str, above: Above) -> Iterator[tuple[str, os.stat_result]]:
    """Yield what `scan` does; `directory` is among those `above`."""
    for entry, status in _entries(directory, start=start, above=above):
        if stat.S_ISDIR(status.st_mode):
            inner = above | {_identity(status)}
            yield from _scan(Path(entry.path), prefix=f"{prefix}{entry.name}/", start="", above=inner)
        else:
            yield prefix + entry.name, status


def _entries(directory: Path, *, start: str, above: Above) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
    """Yield what is right in a directory, each with its status, a link with that of what it leads to."""
    try:
        entries = os.scandir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        for entry in entries:
            if entry.name.startswith(".") or not entry.name.startswith(start):
                continue
            try:
                status = entry.stat()
            except OSError as error:
                if error.errno not in NOTHING_THERE:
                    raise
                _check_no_link(entry.path)
                continue  # removed in between
            if _leads_back(entry.path, status, above=above):
                continue
            yield entry, status


def _leads_back(path: str, status: os.stat_result, *, above: Above) -> bool:
    """Whether a path is a link to one of the directories `above`; says so in the log."""
    leads_back = _identity(status) in above and Path(path).is_symlink()
    if leads_back:
        logger.warning("list %s: the link leads back to a directory above it and is left out", path)
    return leads_back


def _check_no_link(path: str) -> None:
    """Raise ArtifactError where a path that leads nowhere is a link; else it is not there any more."""
    with contextlib.suppress(OSError):
        target = os.readlink(path)  # noqa: PTH115  (its text as it is)
        raise ArtifactError(
            f"list {path}: a link must lead to a file or folder, got one to {target!r}, where there is none; mend or "
            "remove the link"
        )


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
