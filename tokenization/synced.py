"""Files and renames that outlive a crash of the machine, for what a fit leaves; the pipeline has its `storage`."""

from __future__ import annotations

import os
from pathlib import Path


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and have the disk keep it before this returns."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def rename_synced(staged: Path, path: Path) -> None:
    """Make what is staged visible under its name, and have the disk keep the name."""
    staged.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
