"""Reading the images of a unit from a disk or a mount; what an image that cannot be read says is left to evidence.

The invariant: an image is given up only where it fails twice in the same way and another one of its unit can be read
after it. What fails with its neighbours is the storage's fault, and a lack of memory or descriptors this process's:
both raise, so that nothing is booked. The price is one byte of a neighbour for each image that is given up.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.local_storage import raise_outage, read_file
from pipeline.storage import StorageUnavailableError

SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN})
"""What a read fails with where this process or machine lacks something; never the file's fault."""
MAX_NEIGHBOURS = 16


def read_images(root: Path, wanted: Sequence[dict[str, str]]) -> Iterator[dict[str, bytes] | OSError]:
    """Yield what is in the files of each image of a unit, in order; the error for one that alone cannot be read.

    Args:
        root: of the folder.
        wanted: for each image its files below the root: itself under "", its sidecars under their extensions.

    Raises:
        StorageUnavailableError: the disk or the mount fails, or no other image of the unit can be read.
        OSError: this process lacks memory or descriptors, or an image fails each time in another way.
    """
    for index, names in enumerate(wanted):
        try:
            contents: dict[str, bytes] | OSError = _read_image(root, names)
        except OSError as error:
            contents = _read_again(root, wanted, index=index, error=error)
        yield contents


def _read_again(
    root: Path, wanted: Sequence[dict[str, str]], *, index: int, error: OSError
) -> dict[str, bytes] | OSError:
    try:
        return _read_image(root, wanted[index])
    except OSError as second:
        if second.errno != error.errno or second.errno in SHORTAGES:
            raise
    if not _is_storage_there(root, wanted, index=index):
        raise StorageUnavailableError(
            f"read {root}/{wanted[index]['']}: where one file cannot be read another one of its unit must be, got "
            f"{error.strerror} and none that can; check the disk, the mount and the permissions, and run the same "
            "command again"
        ) from error
    return error


def _is_storage_there(root: Path, wanted: Sequence[dict[str, str]], *, index: int) -> bool:
    """Whether one of some images spread over the unit, the next one first, can be read; of a lone one, its root."""
    others = [*wanted[index + 1 :], *wanted[:index]]
    spread = others[:: -(-len(others) // MAX_NEIGHBOURS) or 1]
    try:
        # An empty root is where a mount was.
        return any(_is_readable(f"{root}/{names['']}") for names in spread) if others else any(root.iterdir())
    except OSError as error:
        if error.errno in SHORTAGES:
            raise
        return False


def _is_readable(path: str) -> bool:
    try:
        _read(path, end=1)
    except OSError as error:
        if error.errno in SHORTAGES:
            raise
        return False
    return True


def _read_image(root: Path, names: dict[str, str]) -> dict[str, bytes]:
    return {part: _read(f"{root}/{name}") for part, name in names.items()}


def _read(path: str, *, end: int | None = None) -> bytes:
    """Return the bytes of a file up to `end`; an OSError may be the file's own fault."""
    try:
        return read_file(path, end=end)
    except OSError as error:
        if error.errno != errno.EIO:  # a bad sector's too
            raise_outage(error, doing=f"read {path}")
        raise
