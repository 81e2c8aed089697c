"""Local and mounted directories: what another process may read is staged beside its place, fsynced, then renamed.

The invariant: under its own name a file is whole or absent, whatever is killed and whenever. A staged name starts with
`.staged-`, so that no reader's pattern matches it and a later run can tell leftovers from data. The price is one
fsync of the file and one of its directory for every commit (milliseconds; a shard holds thousands of samples).
A mount that fails (an evicted Lustre client, a stale NFS handle) is told apart from a file that is damaged.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import mmap
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.local_listing import folders_in, scan
from pipeline.storage import (
    ArtifactError,
    Buffer,
    DirectoryInUseError,
    FileInfo,
    Storage,
    StorageUnavailableError,
    is_url,
    json_bytes,
    raise_full,
    sha256_of_stream,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

STAGED_PREFIX = ".staged-"
OUTAGES = frozenset(
    {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EREMOTEIO, errno.EHOSTDOWN}
)
"""What a disk or a mount fails with where the file may be whole."""


def local_path(path: str | Path) -> Path:
    """Return `path` as a local path.

    Args:
        path: a path of a spec; `~` is expanded.

    Raises:
        ArtifactError: the path is a URL (`s3://...`); only local and mounted storage is supported.
    """
    if is_url(str(path)):
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
    _make_directory(path.parent)
    staged_path = path.with_name(f"{STAGED_PREFIX}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield staged_path
        commit(staged_path, path)
    except BaseException as error:
        _remove_any(staged_path)
        if isinstance(error, OSError):
            action = "free some space and run the same command again, what is committed is kept"
            raise_full(error, doing=f"write {path}", action=action)
            raise_outage(error, doing=f"write {path}")
        raise


def _make_directory(path: Path) -> None:
    """Make a directory and those above it that are missing, each kept by its parent as a commit would be."""
    if path.is_dir():
        return
    _make_directory(path.parent)
    path.mkdir(exist_ok=True)
    _fsync(path.parent)


def raise_outage(error: OSError, *, doing: str) -> None:
    """Raise StorageUnavailableError if an error says that a disk or a mount fails; else return."""
    if error.errno in OUTAGES:
        raise StorageUnavailableError(
            f"{doing}: the file system must answer, got {error.strerror}; check the disk or the mount and run the same "
            "command again"
        ) from error


def commit(staged_path: Path, path: Path) -> None:
    """Make a staged file or directory visible as `path`: fsync it, rename it, fsync the parent directory."""
    if staged_path.is_dir():
        for directory, _, names in os.walk(staged_path):
            for name in names:
                _fsync(Path(directory) / name)
            _fsync(Path(directory))
    else:
        _fsync(staged_path)
    rename(staged_path, path)


def rename(path: Path, new_path: Path) -> None:
    """Give what is on disk already, with all below it, its new name, and return when the name is on disk too."""
    path.replace(new_path)
    _fsync(new_path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Commit `data` as the whole content of `path`."""
    with stage(path) as staged_path:
        staged_path.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Commit `value` as indented JSON with a final newline; the keys keep their order, NaN is an error."""
    write_bytes(path, json_bytes(value))


def remove(path: Path) -> None:
    """Remove a file so that the removal outlives a crash; a missing file is fine."""
    remove_all([path])


def remove_all(paths: Iterable[Path]) -> None:
    """Remove files so that the removals outlive a crash; missing files are fine."""
    directories = set()
    for path in paths:
        path.unlink(missing_ok=True)
        directories.add(path.parent)
    for directory in directories:
        if directory.exists():
            _fsync(directory)


def find_staged(directory: Path) -> list[Path]:
    """Return the staged leftovers anywhere below `directory`, sorted."""
    return sorted(directory.rglob(f"{STAGED_PREFIX}*"))


def remove_staged(directory: Path) -> int:
    """Remove the staged leftovers of killed runs below `directory` and return how many there were."""
    leftovers = find_staged(directory)
    for leftover in leftovers:
        _remove_any(leftover)
    return len(leftovers)


def read_file(path: str, *, start: int = 0, end: int | None = None) -> bytes:
    """Return the bytes `[start, end)` of a regular file; to its end without `end`.

    Raises:
        OSError: as the system gives it, outages included.
    """
    # A third of the time of a file object, which counts where a rerun reads 100,000 ledger records.
    descriptor = _open_regular(path)
    try:
        num_bytes = os.fstat(descriptor).st_size
        end = num_bytes if end is None else min(end, num_bytes)
        parts: list[bytes] = []
        while start < end and (part := os.pread(descriptor, end - start, start)):  # one call reads at most 2 GiB
            parts.append(part)
            start += len(part)
    finally:
        os.close(descriptor)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def sha256_of_file(path: Path) -> str:
    """Return the hex sha256 of a file's content."""
    with path.open("rb") as file:
        return sha256_of_stream(file)


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold `directory/.lock` while the body runs, so that two jobs never write one directory; the kernel frees it.

    Raises:
        DirectoryInUseError: another live process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as file:
        while not _lock(file, fcntl.LOCK_EX):
            if not _lock(file, fcntl.LOCK_SH):
                raise DirectoryInUseError(
                    f"write {directory}: one job at a time may write a directory, and another does; wait for it or "
                    f"stop it"
                )
            fcntl.flock(file, fcntl.LOCK_UN)  # others only look, or try as well
        yield


def is_held(directory: Path) -> bool:
    """Whether a process is in `exclusive`; looking makes no file and keeps nobody out."""
    try:
        with (directory / ".lock").open() as file:
            return not _lock(file, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def _lock(file: IO[str], kind: int) -> bool:
    """Whether a lock was to be had at once; kept until the file is closed."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ArtifactError(
            f"lock {file.name}: its file system must have flock, got {error.strerror}; mount it with flock (Lustre: "
            "-o flock), or use another directory"
        ) from error
    return True


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


class LocalStorage(Storage):
    """A directory of a local or mounted file system."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.root = root

    def list(self, prefix: str = "") -> dict[str, FileInfo]:
        """See `Storage.list`."""
        folder, _, start = prefix.rpartition("/")
        try:
            found = ((name, _info(status)) for name, status in scan(self.root, folder=folder, start=start))
            return dict(sorted(found, key=itemgetter(0)))
        except OSError as error:
            raise_outage(error, doing=f"list {self.root / folder}")
            raise

    def folders(self) -> tuple[str, ...]:
        """Return the folders right below the root that a listing enters, sorted, those that hold nothing included."""
        try:
            return tuple(sorted(folders_in(self.root)))
        except OSError as error:
            raise_outage(error, doing=f"list {self.root}")
            raise

    def find(self, name: str) -> FileInfo | None:
        """See `Storage.find`."""
        try:
            return _info((self.root / name).stat())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise_outage(error, doing=f"find {self.root / name}")
            raise

    def read_bytes(self, name: str, *, start: int = 0, end: int | None = None) -> bytes:
        """See `Storage.read_bytes`."""
        try:
            return read_file(f"{self.root}/{name}", start=start, end=end)
        except OSError as error:
            raise_outage(error, doing=f"read {self.root / name}")
            raise

    def open(self, name: str) -> IO[bytes]:
        """See `Storage.open`."""
        return io.BufferedReader(_OpenFile(self.root / name))

    def map(self, name: str) -> Buffer:
        """See `Storage.map`."""
        with self.open(name) as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""  # an empty file cannot be mapped
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def write_bytes(self, name: str, data: bytes) -> FileInfo:
        """See `Storage.write_bytes`."""
        write_bytes(self.root / name, data)
        return _info((self.root / name).stat())

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Path]:
        """See `Storage.stage`."""
        with stage(self.root / name) as staged_path:
            yield staged_path

    def remove(self, name: str) -> None:
        """See `Storage.remove`."""
        remove(self.root / name)

    def remove_all(self, names: Iterable[str]) -> None:
        """See `Storage.remove_all`; one fsync for each directory."""
        remove_all(self.root / name for name in names)

    def find_staged(self) -> tuple[str, ...]:
        """See `Storage.find_staged`."""
        return tuple(path.relative_to(self.root).as_posix() for path in find_staged(self.root))

    def remove_staged(self) -> int:
        """See `Storage.remove_staged`."""
        return remove_staged(self.root)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[threading.Event]:
        """See `Storage.exclusive`; the kernel keeps the lock, so that it is never lost."""
        with exclusive(self.root):
            yield threading.Event()

    def is_held(self) -> bool:
        """See `Storage.is_held`."""
        return is_held(self.root)


class _OpenFile(io.FileIO):
    """A file that tells where its file system fails."""

    def __init__(self, path: Path) -> None:
        self._doing = f"read {path}"
        try:
            super().__init__(str(path), opener=_open_regular)
        except OSError as error:
            raise_outage(error, doing=self._doing)
            raise

    def readinto(self, buffer: WriteableBuffer) -> int:
        try:
            return super().readinto(buffer)
        except OSError as error:
            raise_outage(error, doing=self._doing)
            raise

    def readall(self) -> bytes:
        try:
            return super().readall()
        except OSError as error:
            raise_outage(error, doing=self._doing)
            raise


def _open_regular(path: str, flags: int = os.O_RDONLY) -> int:
    """Return the descriptor of a regular file; OSError for anything else: a pipe would be waited for without end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _info(status: os.stat_result) -> FileInfo:
    return FileInfo(num_bytes=status.st_size, mark=str(status.st_mtime_ns))
