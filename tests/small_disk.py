"""A real disk that fills up: a tmpfs of some KiB, for root alone."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def mounted_disk(directory: Path, *, kib: int) -> Iterator[Path]:
    """Yield `directory`, which is made, with a file system of its own; it is gone afterwards."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
