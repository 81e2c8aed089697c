"""Shards of S3 on the disk of a machine: downloaded whole, once for all ranks, within a bound.

The invariant: what stands under an entry's name is a whole tar of the manifest's size and sha256, and its index; it is
named by the sha256, committed by a rename, and a killed process leaves a staged file that nobody reads and the next one
removes. Whoever maps an entry holds a shared lock on it through the mapping, so eviction (least recently used first)
passes by what is in use. Whole shards and not ranges: a window is read to its end, codes are small (25 MB for 10,000
images), and 10,000 ranged reads cost ten thousand times the requests of one download.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import mmap
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from pipeline.shards import REWRITE, ShardInfo, ShardReader, action_of_open, index_of
from pipeline.storage import ArtifactError, Storage

GB = 10**9
KEPT_FRACTION = 0.9
"""What eviction goes down to, so that it is not at work for every shard."""
DISK_BLOCK_BYTES = 4096
"""What a disk rounds the size of a file up to."""
RESERVED_FRACTION, MOST_RESERVED_BYTES = 0.05, 32 << 30
"""Of the disk, kept free: checkpoints on their way to S3 are staged on the same one, TMPDIR."""
ROOM_WAIT_S = 120.0
WAIT_INTERVAL_S = 0.1
PIECE_BYTES = 1 << 20
NUM_ATTEMPTS = 5
"""Times in a row that the directory may be cleaned away at the wrong moment."""
SHA256 = re.compile(r"[0-9a-f]{64}")
_ENTRY, _STAGED = ".shard", ".staged"

_Result = TypeVar("_Result")

logger = logging.getLogger(__name__)


class ShardCache:
    """A directory of downloaded shards that processes of one machine share."""

    def __init__(self, directory: Path, *, max_bytes: int) -> None:
        """Make the directory; `max_bytes`, and its disk, bound its files, those being downloaded included.

        Raises:
            ArtifactError: it cannot be written.
        """
        self.directory, self.max_bytes = directory, max_bytes
        try:
            with self._locked():
                pass
        except OSError as error:
            raise ArtifactError(
                f"open shard cache {directory}: it must be a directory of ours to write in, got {error}; "
                f"set data.cache_dir"
            ) from error

    def open(self, storage: Storage, name: str, *, info: ShardInfo) -> ShardReader:
        """Return a reader of a shard, downloading it first where no rank of this machine has.

        Args:
            storage: the shard set.
            name: `shards/00000.tar`.
            info: what the manifest says of it.

        Raises:
            ArtifactError: it is missing or not what the manifest says, or the cache has no room for it.
        """
        if not SHA256.fullmatch(info.sha256):  # it becomes a file name
            raise ArtifactError(
                f"download {storage.url_of(name)}: sha256 in its manifest must be 64 hex digits, got {info.sha256!r}; "
                f"rerun the tokenize job to write the manifest again"
            )
        num_bytes = info.bytes + 8 * (info.num_samples + 1)
        try:
            with self._entry(storage, name, info=info, num_bytes=num_bytes) as entry:
                data = memoryview(mmap.mmap(entry, num_bytes, access=mmap.ACCESS_READ))
        except OSError as error:
            raise ArtifactError(
                f"read {storage.url_of(name)}: it must be readable and fit into {self.directory}, got {error}; "
                f"{_action_of(error)}"
            ) from error
        return ShardReader(data[: info.bytes], index=bytes(data[info.bytes :]), where=storage.url_of(name))

    @contextlib.contextmanager
    def _entry(self, storage: Storage, name: str, *, info: ShardInfo, num_bytes: int) -> Iterator[int]:
        """Yield the descriptor of an entry under a shared lock, which mappings of it go on holding (they copy it)."""
        path = self.directory / f"{info.sha256}{_ENTRY}"
        deadline = time.monotonic() + ROOM_WAIT_S
        while True:
            found, staged = _again(lambda: self._find_or_claim(path, num_bytes=num_bytes))
            if found is not None:
                break
            if staged is not None:
                found = self._fill(staged, path, storage=storage, name=name, info=info)
                break
            if time.monotonic() > deadline and not path.with_suffix(_STAGED).exists():
                raise ArtifactError(
                    f"download {storage.url_of(name)}: data.max_cache_gb must have room beside the shards in use, got "
                    f"{self.max_bytes / GB:g} with {self.disk_bytes() / GB:.3g} on the disk of {self.directory}; raise "
                    f"it, free some space or lower data.shuffle_window_shards"
                )
            time.sleep(WAIT_INTERVAL_S)  # another process downloads it, or all that fills the cache is in use
        try:
            yield found
        finally:
            os.close(found)

    def _find_or_claim(self, path: Path, *, num_bytes: int) -> tuple[int | None, int | None]:
        """Return the descriptor of an entry, or else of a staged file to fill, or neither."""
        with self._locked():
            found = _open_whole(path, num_bytes=num_bytes)
            return found, None if found is not None else self._claim(path.with_suffix(_STAGED), num_bytes=num_bytes)

    def _claim(self, staged: Path, *, num_bytes: int) -> int | None:
        """Return a locked staged file of the final size; None where another process has it, or there is no room."""
        descriptor = os.open(staged, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if _try_lock(descriptor):
                os.ftruncate(descriptor, 0)
                if self._make_room(num_bytes, keep=staged):
                    os.ftruncate(descriptor, num_bytes)
                    return descriptor
                staged.unlink()
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _fill(self, staged: int, path: Path, *, storage: Storage, name: str, info: ShardInfo) -> int:
        """Download into a claimed file and commit it; its descriptor is returned under a shared lock.

        A file that was cleaned away meanwhile is only returned: at its name may be one that another process fills.
        """
        began, staged_path = time.monotonic(), path.with_suffix(_STAGED)
        try:
            _download(storage, name, info=info, descriptor=staged)
            os.fsync(staged)
            with self._locked():
                if _is_at(staged_path, staged):
                    with contextlib.suppress(FileNotFoundError):
                        staged_path.rename(path)
                fcntl.flock(staged, fcntl.LOCK_SH)
        except BaseException:
            with self._locked():  # so that nobody claims the file between its removal and the end of its lock
                if _is_at(staged_path, staged):
                    staged_path.unlink(missing_ok=True)
                os.close(staged)
            raise
        logger.debug("downloaded shard=%s seconds=%.2f", storage.url_of(name), time.monotonic() - began)
        return staged

    def disk_bytes(self) -> int:
        """Return what the cache may take on its disk: what it takes now and what is free, less the reserve."""
        taken = sum(file.disk_bytes for file in _found_in(self.directory))
        disk = shutil.disk_usage(self.directory)
        reserved = min(int(RESERVED_FRACTION * disk.total), MOST_RESERVED_BYTES)
        return max(0, taken + disk.free - reserved)

    def _make_room(self, num_bytes: int, *, keep: Path) -> bool:
        """Evict until `num_bytes` more fit, and whether they do; removes what killed processes left."""
        files = sorted(file for file in _found_in(self.directory) if file.path != keep)
        total = num_bytes + sum(file.num_bytes for file in files)
        bound = min(self.max_bytes, self.disk_bytes() - DISK_BLOCK_BYTES * (len(files) + 1))
        goal = bound if total <= bound else int(KEPT_FRACTION * bound)
        for file in files:
            is_left_over = file.path.suffix == _STAGED
            if (total > goal or is_left_over) and _remove_unused(file.path):
                total -= file.num_bytes
        return total <= bound

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the directory's lock: names change only under it, and it is never held over a download.

        Whatever cleans TMPDIR may remove directory and lock at any time; they are made again.
        """
        path = self.directory / ".lock"
        while True:
            descriptor = _again(lambda: self._open_lock(path))
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if _is_at(path, descriptor):
                    yield
                    return
            finally:
                os.close(descriptor)

    def _open_lock(self, path: Path) -> int:
        with contextlib.suppress(FileExistsError):  # it was there and is gone, or is a file, which the open tells
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def default_directory() -> Path:
    """Return where shards are kept unless the spec says: a directory of this user below TMPDIR."""
    return Path(tempfile.gettempdir()) / f"tensorar-shards-{os.getuid()}"


def _again(attempt: Callable[[], _Result]) -> _Result:
    """Return what an attempt does, made again where something cleaned the directory away under it."""
    for _ in range(NUM_ATTEMPTS - 1):
        with contextlib.suppress(FileNotFoundError):
            return attempt()
    return attempt()


def _action_of(error: OSError) -> str:
    """Return what to do about a file of the cache's own: no shard of the set is to be written again for it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space or lower data.max_cache_gb"
    if isinstance(error, FileNotFoundError):
        return "check data.cache_dir and run the same command again"
    return action_of_open(error)


def _open_whole(path: Path, *, num_bytes: int) -> int | None:
    """Return the descriptor of an entry under a shared lock, noted as just used; None where there is none."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size != num_bytes:
        os.close(descriptor)
        path.unlink()
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    os.utime(descriptor)
    return descriptor


class _Found(NamedTuple):
    """A file of the cache; those that were used longest ago come first."""

    used_ns: int
    num_bytes: int
    disk_bytes: int
    """Less than `num_bytes` while it is being downloaded."""
    path: Path


def _found_in(directory: Path) -> Iterator[_Found]:
    """Yield every file; whatever cleans TMPDIR may remove some."""
    for path in directory.iterdir():
        if path.suffix in (_ENTRY, _STAGED):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                yield _Found(status.st_mtime_ns, status.st_size, 512 * status.st_blocks, path)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a living process maps or fills it, and whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        if not _try_lock(descriptor):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


def _download(storage: Storage, name: str, *, info: ShardInfo, descriptor: int) -> None:
    """Write a tar and, behind it, its index: the tar's own, since only the tar has a checksum to be held against.

    Raises:
        ArtifactError: it cannot be read, or size, sha256 or samples are not the manifest's.
    """
    digest, num_bytes = hashlib.sha256(), 0
    for piece in _pieces_of(storage, name):
        digest.update(piece)
        if num_bytes + len(piece) <= info.bytes:
            _write_all(descriptor, piece, at=num_bytes)
        num_bytes += len(piece)
    where = f"download {storage.url_of(name)}"
    if num_bytes != info.bytes:
        raise ArtifactError(f"{where}: it must have the manifest's {info.bytes} bytes, got {num_bytes}; {REWRITE}")
    if digest.hexdigest() != info.sha256:
        raise ArtifactError(
            f"{where}: sha256 must be the manifest's {info.sha256[:8]}.., got {digest.hexdigest()[:8]}..; {REWRITE}"
        )
    index = index_of(memoryview(mmap.mmap(descriptor, info.bytes, access=mmap.ACCESS_READ)))
    if len(index) != 8 * (info.num_samples + 1):
        num_samples = len(index) // 8 - 1
        raise ArtifactError(
            f"{where}: it must hold the manifest's {info.num_samples} samples, got {num_samples}; {REWRITE}"
        )
    _write_all(descriptor, index, at=info.bytes)


def _pieces_of(storage: Storage, name: str) -> Iterator[bytes]:
    try:
        with storage.open(name) as source:
            while piece := source.read(PIECE_BYTES):
                yield piece
    except OSError as error:
        raise ArtifactError(
            f"read {storage.url_of(name)}: it must be readable, got {error}; {action_of_open(error)}"
        ) from error


def _write_all(descriptor: int, data: bytes, *, at: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], at + written)
