"""Where artifacts live: a directory, on a file system or on S3, whose files are whole or absent under their names.

The invariant: what `write_bytes` and `stage` commit appears in one step (a rename, or the completion of an upload), so
no reader ever sees a part of it, whatever is killed and whenever. Names are relative to the directory, with slashes.
Listings carry size and mark, so that a scan of 100,000 files needs no request for each of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

from pipeline.config import S3Config

S3_SCHEME = "s3://"
HASH_BLOCK_BYTES = 1 << 20
URL_START = re.compile(r"[A-Za-z0-9]+:/")
Buffer = bytes | memoryview
"""The whole content of a file, mapped where it is local."""


class ArtifactError(RuntimeError):
    """An artifact is missing, damaged, of another make, or cannot be written; the message says what to do."""

    def __str__(self) -> str:
        """Return the message as text that UTF-8 can hold: bytes of names in another encoding are escaped."""
        return super().__str__().encode("utf-8", "backslashreplace").decode()


class DirectoryInUseError(ArtifactError):
    """Another live process writes the directory; waiting for it may help."""


class StorageFullError(ArtifactError):
    """There is no room for another file; nothing else that a job could try will help."""


class StagingFullError(StorageFullError):
    """There is no room on this machine for a file on its way to S3; another machine may have some."""


class StorageUnavailableError(ArtifactError):
    """The storage does not answer, or lets nobody in; what is asked for may be whole, and trying later may help."""


def raise_full(error: OSError, *, doing: str, action: str, kind: type[StorageFullError] = StorageFullError) -> None:
    """Raise StorageFullError, or a kind of it, if an error says that there is no room; else return."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise kind(f"{doing}: {(error.strerror or 'disk full').lower()}; {action}") from error


def next_action(error: BaseException, *, otherwise: str) -> str:
    """Return what to do about a file that could not be read: one that is forbidden may be whole as it is."""
    return "give the user of the job permission to read it" if isinstance(error, PermissionError) else otherwise


class FileInfo(NamedTuple):
    """What a listing says of a file.

    Attributes:
        num_bytes: its size.
        mark: changes when the file is written again: the modification time in ns, or the ETag on S3.
    """

    num_bytes: int
    mark: str


class Storage(ABC):
    """A directory whose files are committed whole; made with `open_storage`.

    Every method raises `FileNotFoundError` for a missing file and `ArtifactError` where the storage cannot be used
    (no permission, no such bucket, disk full, retries exhausted), naming the file and the next action.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") or "/"

    def __str__(self) -> str:
        return self.url

    def url_of(self, name: str) -> str:
        """Return the full path or URL of a file, for messages and for other programs."""
        return f"{self.url}/{name}" if name else self.url

    @abstractmethod
    def list(self, prefix: str = "") -> dict[str, FileInfo]:
        """Return the committed files whose names start with `prefix`, at any depth, sorted by name.

        Costs one pass over the directory, or one request for each 1,000 objects; staged files are left out.
        """

    @abstractmethod
    def find(self, name: str) -> FileInfo | None:
        """Return what a listing would say of one file; None where it is missing."""

    @abstractmethod
    def read_bytes(self, name: str, *, start: int = 0, end: int | None = None) -> bytes:
        """Return the bytes `[start, end)` of a file; to its end without `end`.

        On S3 a broken or short answer is resumed by range, with back-off.
        """

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """Return a file opened for reading, seekable; on S3 it reads ahead and resumes broken reads."""

    @abstractmethod
    def map(self, name: str) -> Buffer:
        """Return the whole content of a file: memory-mapped where local, downloaded where not."""

    @abstractmethod
    def write_bytes(self, name: str, data: bytes) -> FileInfo:
        """Commit `data` as the whole content of a file, replacing an older one."""

    def write_json(self, name: str, value: Any) -> FileInfo:
        """Commit `value` as indented JSON with a final newline; the keys keep their order, NaN is a ValueError."""
        return self.write_bytes(name, json_bytes(value))

    @abstractmethod
    def stage(self, name: str) -> AbstractContextManager[Path]:
        """Return a context whose value is a local path to write to; a clean exit commits it as `name`.

        After an error nothing is committed and the local file is removed.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file so that the removal outlives a crash; a missing file is fine."""

    @abstractmethod
    def remove_all(self, names: Iterable[str]) -> None:
        """Remove files, in no order, as `remove` does one: in a fraction of the time, and not all at one moment."""

    @abstractmethod
    def find_staged(self) -> tuple[str, ...]:
        """Return the names of what killed runs, or running jobs, have staged and not committed, sorted."""

    @abstractmethod
    def remove_staged(self) -> int:
        """Remove what killed runs left half-written (staged files, open uploads) and return how many there were."""

    @abstractmethod
    def exclusive(self) -> AbstractContextManager[threading.Event]:
        """Return a context that holds the directory's lock, so that two jobs never write it at once.

        Its value is set if the lock is lost: on S3 another job may take it over from one that could not renew it.

        Raises:
            DirectoryInUseError: on entry, where another live process holds it.
        """

    @abstractmethod
    def is_held(self) -> bool:
        """Whether a live process holds `exclusive`; a look, that writes nothing and keeps nobody out."""


@lru_cache(maxsize=64)
def open_storage(url: str, *, s3: S3Config = S3Config()) -> Storage:  # noqa: B008  (frozen)
    """Return the storage behind a path or an `s3://bucket/prefix` URL; touches nothing yet.

    Args:
        url: a directory; `~` is expanded.
        s3: how S3 is reached; of no meaning for paths.

    Raises:
        ArtifactError: the URL has another scheme.
    """
    # Both build on this module; and aiobotocore takes half a second to import.
    if url.startswith(S3_SCHEME):
        from pipeline.s3.storage import S3Storage  # noqa: PLC0415

        return S3Storage(url, config=s3)
    from pipeline.local_storage import LocalStorage  # noqa: PLC0415

    if is_url(url):
        raise ArtifactError(
            f"open {url}: storage must be a path or an s3:// URL, got {url!r}; correct it to s3://, or mount or copy it"
        )
    return LocalStorage(Path(url).expanduser())


def is_url(path: str) -> bool:
    """Whether a path is a URL, one slash short of it (`s3:/bucket/x`) included."""
    return "://" in path or URL_START.match(path) is not None


def split_url(url: str) -> tuple[str, str]:
    """Return directory and name of a file: (`s3://b/x`, `a.tar`) for `s3://b/x/a.tar`, (`.`, `a.tar`) for `a.tar`."""
    directory, slash, name = url.rpartition("/")
    return (directory or slash or "."), name


def json_bytes(value: Any) -> bytes:
    """Return indented JSON with a final newline, as UTF-8; the keys keep their order, NaN is a ValueError."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256_of(data: Buffer) -> str:
    """Return the hex sha256 of a file's content."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_stream(file: IO[bytes]) -> str:
    """Return the hex sha256 of what is left to read of a file, holding a block of it at a time."""
    digest = hashlib.sha256()
    while block := file.read(HASH_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()
