"""Writes that another process may read: staged beside their place, fsynced, committed in one rename.

The invariant: under its own name a file is whole or absent, whatever is killed and whenever. A staged name starts with
`.staged-`, so that no reader's pattern matches it and a later run can tell leftovers from data. The price is one
fsync of the file and one of its directory for every commit (milliseconds; a shard holds thousands of samples).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STAGED_PREFIX = ".staged-"
HASH_BLOCK_BYTES = 1 << 20


class ArtifactError(RuntimeError):
    """An artifact on disk is missing, damaged, of another make, or cannot be written; the message says what to do."""


def local_path(path: str | Path) -> Path:
    """Return `path` as a local path.

    Args:
        path: a path of a spec; `~` is expanded.

    Raises:
        ArtifactError: the path is a URL (`s3://...`); only local and mounted storage is supported.
    """
    if "://" in str(path):
        raise ArtifactError(f"open {path}: storage must be local or mounted, got {str(path)!r}; use a directory path")
    return Path(path).expanduser()


@contextlib.contextmanager
def stage(path: Path) -> Iterator[Path]:
    """Yield a staged path beside `path`; on a clean exit what was written there is committed as `path`.

    A staged directory is committed too, with every file below it fsynced; its place must then be free.

    Args:
        path: the final place; its directory is made where it is missing, and an old file there is replaced.

    Yields:
        The path to write to; it does not exist yet. After an error it is removed and `path` is as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged_path = path.with_name(f"{STAGED_PREFIX}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield staged_path
        commit(staged_path, path)
    except BaseException:
        _remove_any(staged_path)
        raise


def commit(staged_path: Path, path: Path) -> None:
    """Make a staged file or directory visible as `path`: fsync it, rename it, fsync the parent directory."""
    if staged_path.is_dir():
        for directory, _, names in os.walk(staged_path):
            for name in names:
                _fsync(Path(directory) / name)
            _fsync(Path(directory))
    else:
        _fsync(staged_path)
    staged_path.replace(path)
    _fsync(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Commit `data` as the whole content of `path`."""
    with stage(path) as staged_path:
        staged_path.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Commit `value` as indented JSON with a final newline; the keys keep their order, NaN is an error."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def remove(path: Path) -> None:
    """Remove a file so that the removal outlives a crash; a missing file is fine."""
    path.unlink(missing_ok=True)
    if path.parent.exists():
        _fsync(path.parent)


def find_staged(directory: Path) -> list[Path]:
    """Return the staged leftovers anywhere below `directory`, sorted."""
    return sorted(directory.rglob(f"{STAGED_PREFIX}*"))


def remove_staged(directory: Path) -> int:
    """Remove the staged leftovers of killed runs below `directory` and return how many there were."""
    leftovers = find_staged(directory)
    for leftover in leftovers:
        _remove_any(leftover)
    return len(leftovers)


def sha256_of_file(path: Path) -> str:
    """Return the hex sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold `directory/.lock` while the body runs, so that two jobs never write one directory; the kernel frees it.

    Raises:
        ArtifactError: another live process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ArtifactError(
                f"write {directory}: one job at a time may write a directory, and another does; wait for it or stop it"
            ) from error
        yield


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_any(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
